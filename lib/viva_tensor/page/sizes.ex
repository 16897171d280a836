defmodule VivaTensor.Page.Sizes do
  @moduledoc false
  # How large each layer was and is: a bar for before, with one in it for what is left.

  import VivaTensor.Markup, only: [element: 2]
  import VivaTensor.Page.Parts

  alias VivaTensor.Report

  @most 200

  @doc "The section of these rows of a report."
  @spec section([map]) :: VivaTensor.Page.Parts.section()
  def section([]), do: nil

  def section(rows) do
    layers = layers(rows)
    {drawn, note} = at_most(layers, @most, & &1.before, "the largest layers")
    widest = drawn |> Enum.map(&max(&1.before, &1.kept + &1.changed)) |> Enum.max() |> max(1)

    done = done(rows)

    section("sizes", "Size of each layer", "Bytes of its tensors before and after.#{note}", [
      legend([{"before", "before"}, {"quantized", "after, #{done}"}, {"kept", "after, kept"}]),
      plot("Size of each layer", rows(for layer <- drawn, do: row(layer, done, widest)))
    ])
  end

  defp layers(rows) do
    rows
    |> Enum.with_index()
    |> Enum.group_by(fn {row, _index} -> Report.layer(row["name"]) end)
    |> Enum.sort_by(fn {_name, [{_row, first} | _]} -> first end)
    |> Enum.map(fn {name, rows} ->
      {kept, changed} = Enum.split_with(rows, fn {row, _} -> row["action"] == "keep" end)
      before = sum(rows, "input_bytes")
      %{name: name, before: before, kept: bytes(kept), changed: bytes(changed)}
    end)
  end

  defp bytes(rows), do: sum(rows, "output_bytes")
  defp sum(rows, key), do: Enum.reduce(rows, 0, fn {row, _}, sum -> sum + row[key] end)

  defp row(layer, done, widest) do
    bytes = layer.kept + layer.changed
    figure = "#{size(layer.before)} → #{size(bytes)}"

    parts =
      for {what, n} <- [{done, layer.changed}, {"kept", layer.kept}],
          n > 0,
          do: "#{size(n)} #{what}"

    shapes = [
      element("rect", class: "before", height: 18, width: percent(layer.before / widest), rx: 2),
      bar("quantized", 0, layer.changed, widest),
      bar("kept", layer.changed, layer.kept, widest)
    ]

    title = "#{layer.name}: #{figure}#{if parts != [], do: " (#{Enum.join(parts, ", ")})"}"
    {layer.name, drawing(18, mark(title, nil, shapes)), figure}
  end

  defp bar(_class, _from, 0, _widest), do: nil

  defp bar(class, from, bytes, widest) do
    {x, width} = {percent(from / widest), percent(bytes / widest)}
    element("rect", class: class, x: x, y: 4, height: 10, width: width)
  end
end
