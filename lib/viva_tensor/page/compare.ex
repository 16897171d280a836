defmodule VivaTensor.Page.Compare do
  @moduledoc false
  # The page of a comparison of formats: what `mix viva.compare --json` prints, in pictures.

  import VivaTensor.Markup, only: [element: 3, raw: 1]
  import VivaTensor.Page.Parts

  alias VivaTensor.Compare.Front
  alias VivaTensor.Page.Histogram

  @most_rows 1_000

  @doc "Whether data is a comparison."
  @spec shows?(term) :: boolean
  def shows?(%{"rows" => rows, "absent" => absent, "tensors" => tensors} = data)
      when is_list(rows) and is_list(absent) and is_list(tensors) do
    is_binary(data["source"]) and data["measured_on"] in [nil, "held_out", "calibration"] and
      Enum.all?(tensors, &is_binary/1) and Enum.all?(rows, &row?/1) and
      Enum.all?(absent, &absent?/1)
  end

  def shows?(_data), do: false

  defp row?(%{"format" => format, "method" => method, "bits_per_weight" => bits} = row) do
    is_binary(format) and is_binary(method) and is_number(bits) and is_boolean(row["front"]) and
      Enum.all?(~w(sqnr_db output_error), &(is_nil(row[&1]) or is_number(row[&1])))
  end

  defp row?(_other), do: false

  defp absent?(%{"format" => format, "method" => method, "reason" => reason}),
    do: Enum.all?([format, method, reason], &is_binary/1)

  defp absent?(_other), do: false

  @doc "Its title, and its sections."
  @spec page(map) :: VivaTensor.Page.page()
  def page(compared) do
    rows = Enum.take(compared["rows"], @most_rows)
    front = Enum.filter(rows, & &1["front"])

    %{
      title: "Formats on #{Path.basename(compared["source"])}",
      lead: element("p", [class: "lead"], about(compared)),
      sections: [
        front(rows, compared["measured_on"]),
        Histogram.section(front),
        table(rows, compared),
        absent(compared["absent"])
      ],
      footer: element("p", [], element("code", [], compared["source"]))
    }
  end

  defp about(%{"tensors" => [name], "weights" => _}), do: name

  defp about(%{"tensors" => names, "weights" => n}) when is_integer(n),
    do: "#{plural(length(names), "tensor")}, #{count(n)} weights together"

  defp about(%{"tensors" => names}), do: plural(length(names), "tensor")

  defp front([], _measured_on), do: nil

  defp front(rows, measured_on) do
    known =
      for row <- rows do
        %{
          format: row["format"],
          method: row["method"],
          bits_per_weight: row["bits_per_weight"],
          sqnr_db: row["sqnr_db"],
          output_error: row["output_error"],
          front: row["front"]
        }
      end

    about =
      "Bits per weight against the #{Front.axis(measured_on)}. The line joins what no other " <>
        "beats in both."

    scroll = [class: "scroll picture", role: "region", tabindex: 0, "aria-label": "Pareto front"]
    svg = known |> Front.svg(measured_on, nil) |> raw()

    section("front", "Pareto front", about, [
      plot("Formats by bits per weight and error", element("div", scroll, svg))
    ])
  end

  defp table(rows, compared) do
    error? = compared["measured_on"] != nil
    count = length(compared["tensors"])
    partial? = Enum.any?(rows, &(&1["tensors"] != count))

    columns =
      [{"format", :text}, {"method", :text}] ++
        if(partial?, do: [{"tensors", :number}], else: []) ++
        [{"bits/w", :number}, {"SQNR dB", :number}] ++
        if(error?, do: [{"output error", :number}], else: []) ++
        [{"time", :number}, {"front", :text}]

    cells = fn row ->
      [row["format"], row["method"]] ++
        if(partial?, do: [decimals(row["tensors"], 0)], else: []) ++
        [decimals(row["bits_per_weight"], 3), decimals(row["sqnr_db"], 2)] ++
        if(error?, do: [decimals(row["output_error"], 5)], else: []) ++
        [if(is_number(row["seconds"]), do: time(row["seconds"])), if(row["front"], do: "★")]
    end

    section("formats", "Every format", "★ no other has fewer bits and less error.", [
      table("Every format", columns, for(row <- rows, do: {[], cells.(row)}))
    ])
  end

  defp absent([]), do: nil

  defp absent(absent) do
    grouped = Enum.group_by(absent, & &1["reason"], &"#{&1["format"]} #{&1["method"]}")
    columns = [{"reason", :long}, {"what", :long}]

    rows =
      for {reason, what} <- Enum.sort(grouped),
          do: {[], [reason, what |> Enum.uniq() |> Enum.join(", ")]}

    section("absent", "Not measured", nil, table("What was not measured, and why", columns, rows))
  end
end
