defmodule VivaTensor.Page.Histogram do
  @moduledoc false
  # Where the weights are, and where the values that a format has for them.

  import VivaTensor.Markup, only: [element: 2, element: 3]
  import VivaTensor.Page.Parts

  alias VivaTensor.Plot.Axis

  @height 96
  # Thinner than a bin, so that the weights behind are seen.
  @spike 0.5
  # Formats that are drawn, and bins of one.
  @most 24
  @most_bins 1_000

  @doc "The section of those of these rows of a comparison that have a histogram."
  @spec section([map]) :: VivaTensor.Page.Parts.section()
  def section(rows) do
    case Enum.filter(rows, &histogram?(&1["histogram"])) do
      [] -> nil
      rows -> drawn(Enum.take(rows, @most))
    end
  end

  defp histogram?(%{"weights" => weights, "values" => values})
       when is_list(weights) and is_list(values) do
    length(weights) in 2..@most_bins and length(values) == length(weights) and
      Enum.all?(weights ++ values, &(is_integer(&1) and &1 >= 0)) and Enum.sum(weights) > 0
  end

  defp histogram?(_none), do: false

  defp drawn(rows) do
    about =
      "Weights from the least to the greatest value of their block, and how many of them each " <>
        "value of the format stands for: of the formats on the front. Weights at the ends are " <>
        "those that are clipped to them, and the largest."

    section("histogram", "Weights against the codebook", about, [
      legend([{"before", "weights"}, {"quantized", "values of the format"}]),
      element("div", [class: "small"], Enum.map(rows, &one/1))
    ])
  end

  defp one(%{"histogram" => histogram} = row) do
    %{"weights" => weights, "values" => values} = histogram
    bins = length(weights)
    name = "#{row["format"]} #{row["method"]}"
    axis = Axis.new([-1, 1], margin: 1 / (2 * bins))

    plot("Weights against the values of #{name}", [
      element("p", [class: "name"], [
        element("strong", [], name),
        ", #{decimals(row["bits_per_weight"], 2)} bits per weight"
      ]),
      drawing(@height, [grid(axis), bars(weights), spikes(values, bins)]),
      scale(axis, "least to greatest value of a block")
    ])
  end

  defp bars(counts) do
    {most, bins} = {Enum.max(counts), length(counts)}

    for {count, bin} <- Enum.with_index(counts), count > 0 do
      shape(bin / bins, 1 / bins, count / most, "before")
    end
  end

  defp spikes(counts, bins) do
    {most, all} = {max(Enum.max(counts), 1), max(Enum.sum(counts), 1)}

    for {count, bin} <- Enum.with_index(counts), count > 0 do
      value = Axis.number(Float.round((2 * bin + 1) / bins - 1, 3))
      title = "#{decimals(100 * count / all, 2)} % of the values are near #{value}"
      from = (bin + (1 - @spike) / 2) / bins
      mark(title, nil, shape(from, @spike / bins, count / most, "quantized"))
    end
  end

  defp shape(from, width, part, class) do
    height = Float.round(max(part * @height, 1.0), 2)
    y = Float.round(@height - height, 2)
    element("rect", class: class, x: percent(from), y: y, width: percent(width), height: height)
  end
end
