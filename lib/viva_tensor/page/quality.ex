defmodule VivaTensor.Page.Quality do
  @moduledoc false
  # How good each quantized tensor still is: a dot for each, those of the same kind of
  # layer in a row.

  import VivaTensor.Markup, only: [element: 2]
  import VivaTensor.Page.Parts

  alias VivaTensor.Plot.Axis
  alias VivaTensor.Report

  @most 2_000
  @most_kinds 120

  @doc "The section of these rows of a report; `href` is where a row leads to."
  @spec section([map], (map -> String.t() | nil)) :: VivaTensor.Page.Parts.section()
  def section(rows, href) do
    case Enum.filter(rows, &is_number(&1["sqnr_db"])) do
      [] -> nil
      measured -> drawn(measured, href)
    end
  end

  defp drawn(measured, href) do
    {dots, note} = at_most(measured, @most, &(-&1["sqnr_db"]), "those with the lowest SQNR")

    kinds =
      for {kind, rows} <- Enum.group_by(dots, &Report.kind(&1["name"])),
          rows = Enum.sort_by(rows, & &1["sqnr_db"]),
          do: {kind, rows}

    by = fn {_, [lowest | _]} -> lowest["sqnr_db"] end
    {kinds, more} = at_most(kinds, @most_kinds, &(-by.(&1)), "kinds with the lowest SQNR")
    axis = Axis.new(for {_, rows} <- kinds, row <- rows, do: row["sqnr_db"])

    about =
      "Signal to quantization noise, higher is better: 6 dB is half the error. A dot is a tensor."

    section("quality", "SQNR of each tensor", "#{about}#{note}#{more}", [
      plot("SQNR of each quantized tensor, by kind of layer", [
        rows(for {kind, rows} <- Enum.sort_by(kinds, by), do: row(kind, rows, axis, href)),
        rows([{nil, scale(axis, "SQNR, dB"), nil}])
      ])
    ])
  end

  defp row(kind, [lowest | _] = rows, axis, href) do
    dots =
      for row <- rows do
        x = percent(Axis.part(axis, row["sqnr_db"]))
        title = "#{row["name"]}: #{decimals(row["sqnr_db"], 2)} dB"
        mark(title, href.(row), element("circle", class: "dot", cx: x, cy: 13, r: 4.5))
      end

    {String.replace_suffix(kind, ".weight", ""), drawing(26, [grid(axis), dots]),
     range(lowest, List.last(rows))}
  end

  defp range(lowest, highest) do
    case for row <- [lowest, highest], do: decimals(row["sqnr_db"], 2) do
      [same, same] -> same
      [low, high] -> "#{low} – #{high}"
    end
  end
end
