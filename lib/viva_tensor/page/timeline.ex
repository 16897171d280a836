defmodule VivaTensor.Page.Timeline do
  @moduledoc false
  # When each unit was done: a lane for each worker, a bar for each unit.

  import VivaTensor.Markup, only: [element: 2]
  import VivaTensor.Page.Parts

  alias VivaTensor.Plot.Axis

  @most 2_000
  @most_workers 200
  # So that the shortest unit can be seen.
  @least_width 0.0015
  @height 20

  @doc """
  The section of these rows of a report, whose job took so many seconds; `href` is where
  a row leads to.
  """
  @spec section([map], number, (map -> String.t() | nil)) :: VivaTensor.Page.Parts.section()
  def section(rows, seconds, href) do
    case rows |> Enum.flat_map(&units/1) |> Enum.filter(&timed?/1) do
      [] -> nil
      timed -> drawn(timed, seconds, href)
    end
  end

  # Of a huge tensor a unit does a range of rows.
  defp units(%{"ranges" => [_ | _] = ranges} = row) do
    for %{"rows" => [first, last]} = range when is_integer(first) and is_integer(last) <- ranges do
      row |> Map.merge(range) |> Map.put("units", "rows #{first} to #{last - 1}")
    end
  end

  defp units(row), do: [row]

  defp timed?(row), do: is_number(row["began"]) and is_number(row["ended"])

  defp drawn(timed, seconds, href) do
    {units, note} = at_most(timed, @most, &length_of/1, "the longest units")
    busy = Enum.reduce(timed, %{}, &busier/2)
    units = Enum.group_by(units, &worker/1)
    workers = busy |> Map.keys() |> Enum.sort()
    {shown, more} = at_most(workers, @most_workers, &busy[&1], "the busiest workers")
    axis = Axis.new([0, seconds | Enum.map(timed, & &1["ended"])], margin: 0)

    about =
      "What each of #{plural(length(workers), "worker")} did when, in seconds since the job " <>
        "began, and how long it worked."

    again = if Enum.any?(timed, & &1["verified"]), do: [{"verified", "done before, verified"}]
    lanes = for worker <- shown, do: lane(worker, units[worker] || [], busy[worker], axis, href)

    section("time", "Time line", "#{about}#{note}#{more}", [
      legend([{"quantized", done(timed)}, {"kept", "kept"} | again || []]),
      plot("Time line of units by worker", [
        rows(lanes),
        rows([{nil, scale(axis, "seconds"), nil}])
      ])
    ])
  end

  defp worker(row), do: {row["node"], row["worker"]}
  defp length_of(row), do: row["ended"] - row["began"]

  defp busier(row, busy),
    do: Map.update(busy, worker(row), length_of(row), &(&1 + length_of(row)))

  defp lane({node, worker}, units, busy, axis, href) do
    bars = for unit <- Enum.sort_by(units, & &1["began"]), do: bar(unit, axis, href)
    name = Enum.join(List.wrap(node) ++ ["worker #{worker}"], " ")
    {name, drawing(@height + 6, [grid(axis), bars]), time(busy)}
  end

  defp bar(unit, axis, href) do
    from = Axis.part(axis, unit["began"])
    width = max(Axis.part(axis, unit["ended"]) - from, @least_width)
    from = min(from, 1 - @least_width)
    {x, width} = {percent(from), percent(width)}

    title =
      "#{Enum.join([unit["name"] | List.wrap(unit["units"])], " ")}: #{what(unit)} in #{time(length_of(unit))}, " <>
        "from #{time(unit["began"])} to #{time(unit["ended"])}#{attempt(unit["attempt"])}"

    shape = element("rect", class: class(unit), x: x, y: 3, width: width, height: @height)
    mark(title, href.(unit), shape)
  end

  defp class(%{"verified" => true}), do: "verified"
  defp class(%{"action" => "keep"}), do: "kept"
  defp class(_row), do: "quantized"

  defp what(%{"verified" => true}), do: "verified"
  defp what(%{"action" => "keep"}), do: "kept"
  defp what(row), do: done([row])

  defp attempt(n) when is_integer(n) and n > 1, do: ", attempt #{n}"
  defp attempt(_first), do: nil
end
