defmodule VivaTensor.Job.Rows do
  @moduledoc false
  # What the report of a job says of its units, as the manifest has it: while it runs, a job
  # of a million units holds none of that in memory.

  alias VivaTensor.{Error, Report}
  alias VivaTensor.Job.{Manifest, Span, Unit}

  @doc "The rows of these units that a manifest tells of, in the order of the units."
  @spec read(Path.t(), [Unit.t()]) :: {:ok, [Report.row()]} | {:error, Error.t()}
  def read(manifest, units) do
    with {:ok, rows, _at} <- Manifest.reduce(manifest, %{}, &add/2),
         do: {:ok, in_order(rows, units)}
  end

  @doc "The same of records that were read."
  @spec of([Manifest.entry()], [Unit.t()]) :: [Report.row()]
  def of(records, units), do: records |> Enum.reduce(%{}, &add/2) |> in_order(units)

  defp in_order(rows, units) do
    for unit <- units, {_shard, row} <- [rows[unit.name]], do: row
  end

  # Of a unit that was done twice the last counts, and none that was done for a shard
  # which others replace.
  defp add({:unit, shard, name, %{row: row}}, rows), do: Map.put(rows, name, {shard, row})

  defp add({:verified, name, span}, rows) do
    Map.update!(rows, name, fn {shard, row} -> {shard, Span.put(row, span)} end)
  end

  defp add({:rewritten, again, _kept}, rows) do
    Map.reject(rows, fn {_name, {shard, _row}} -> shard == again end)
  end

  defp add(_record, rows), do: rows
end
