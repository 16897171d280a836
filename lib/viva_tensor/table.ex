defmodule VivaTensor.Table do
  @moduledoc """
  Text tables for terminals and for Markdown, in plain ASCII: a bare container
  has no UTF-8 locale.
  """

  @type align :: :left | :right
  @type column :: {String.t(), align}

  @doc """
  Rows under their column titles, aligned with spaces.

      iex> VivaTensor.Table.text([{"name", :left}, {"bytes", :right}], [["a.weight", 12], ["b", nil]])
      ...> |> IO.iodata_to_binary()
      "name      bytes\\na.weight     12\\nb\\n"
  """
  @spec text([column], [[term]]) :: iodata
  def text(columns, rows) do
    {titles, rows, widths} = measure(columns, rows)

    for row <- [titles | rows] do
      line = row |> pad(columns, widths) |> Enum.join("  ")
      [String.trim_trailing(line), ?\n]
    end
  end

  @doc """
  The same table in Markdown.

      iex> VivaTensor.Table.markdown([{"name", :left}, {"n", :right}], [["a", 12]])
      ...> |> IO.iodata_to_binary()
      "| name |  n |\\n|------|---:|\\n| a    | 12 |\\n"
  """
  @spec markdown([column], [[term]]) :: iodata
  def markdown(columns, rows) do
    {titles, rows, widths} = measure(columns, rows)
    [head | body] = for row <- [titles | rows], do: row |> pad(columns, widths) |> markdown_row()

    rules =
      for {{_, align}, width} <- Enum.zip(columns, widths) do
        case align do
          :left -> [?|, String.duplicate("-", width + 2)]
          :right -> [?|, String.duplicate("-", width + 1), ?:]
        end
      end

    [head, rules, "|\n" | body]
  end

  defp markdown_row(cells), do: ["| ", Enum.intersperse(cells, " | "), " |\n"]

  defp measure(columns, rows) do
    titles = Enum.map(columns, &elem(&1, 0))
    rows = for row <- rows, do: Enum.map(row, &cell/1)

    widths =
      [titles | rows]
      |> Enum.zip_with(& &1)
      |> Enum.map(fn column -> column |> Enum.map(&String.length/1) |> Enum.max() end)

    {titles, rows, widths}
  end

  defp pad(row, columns, widths) do
    for {text, {_, align}, width} <- Enum.zip([row, columns, widths]) do
      case align do
        :left -> String.pad_trailing(text, width)
        :right -> String.pad_leading(text, width)
      end
    end
  end

  defp cell(nil), do: ""
  defp cell(text) when is_binary(text), do: text
  defp cell(term), do: to_string(term)
end
