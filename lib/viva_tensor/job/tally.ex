defmodule VivaTensor.Job.Tally do
  @moduledoc """
  How the units and shards of a job stand.
  """

  alias VivaTensor.{Error, Report}
  alias VivaTensor.Job.{Manifest, Observation, Plan, Shard, Unit}

  defstruct shards: %{},
            rows: %{},
            quarantined: %{},
            tensors: 0,
            bytes: 0,
            tensors_done: 0,
            bytes_done: 0,
            bytes_written: 0

  @typedoc """
  `rows` of the report are by the ids of units, as are those that are `quarantined`.
  """
  @type t :: %__MODULE__{
          shards: %{Manifest.shard() => Shard.t()},
          rows: %{non_neg_integer => Report.row()},
          quarantined: %{non_neg_integer => Report.quarantined()},
          tensors: non_neg_integer,
          bytes: non_neg_integer,
          tensors_done: non_neg_integer,
          bytes_done: non_neg_integer,
          bytes_written: non_neg_integer
        }

  @doc "Nothing done of these shards."
  @spec new([Shard.t()]) :: t
  def new(shards) do
    units = Enum.flat_map(shards, & &1.units)

    %__MODULE__{
      shards: Map.new(shards, &{&1.id, &1}),
      tensors: length(units),
      bytes: units |> Enum.map(& &1.input_bytes) |> Enum.sum()
    }
  end

  @doc "The shards in the order of the source."
  @spec in_order(t) :: [Shard.t()]
  def in_order(tally), do: tally.shards |> Map.values() |> Enum.sort_by(& &1.id)

  @doc "The rows of units that are done, in the order of the source."
  @spec rows(t) :: [Report.row()]
  def rows(tally) do
    for shard <- in_order(tally), unit <- shard.units, row = tally.rows[unit.id], do: row
  end

  @doc "The units that were put aside, in the order of the source."
  @spec quarantined(t) :: [Report.quarantined()]
  def quarantined(tally), do: tally.quarantined |> Enum.sort() |> Enum.map(&elem(&1, 1))

  @doc "What was found out about units is noted in them."
  @spec annotate(t, %{String.t() => String.t()}) :: t
  def annotate(tally, notes) do
    annotated = &%{&1 | units: Enum.map(&1.units, fn u -> Observation.annotate(u, notes) end)}
    %{tally | shards: Map.new(tally.shards, fn {id, shard} -> {id, annotated.(shard)} end)}
  end

  @doc "A unit is done."
  @spec done(t, Manifest.shard(), Unit.t(), Report.row()) :: t
  def done(tally, id, unit, row) do
    %{
      tally
      | rows: Map.put(tally.rows, unit.id, row),
        tensors_done: tally.tensors_done + 1,
        bytes_done: tally.bytes_done + unit.input_bytes,
        bytes_written: tally.bytes_written + row.output_bytes
    }
    |> update(id, &Shard.unit_done/1)
  end

  @doc "A unit's weight has to be kept after all."
  @spec keep_later(t, Manifest.shard(), Unit.t(), String.t()) :: t
  def keep_later(tally, id, unit, reason),
    do: update(tally, id, &Shard.keep_later(&1, unit, reason))

  @doc "A unit is put aside."
  @spec put_aside(t, Manifest.shard(), Unit.t(), Report.quarantined()) :: t
  def put_aside(tally, id, unit, why) do
    %{tally | quarantined: Map.put(tally.quarantined, unit.id, why)}
    |> update(id, &Shard.put_aside/1)
  end

  @doc "Changes a shard."
  @spec update(t, Manifest.shard(), (Shard.t() -> Shard.t())) :: t
  def update(tally, id, fun), do: %{tally | shards: Map.update!(tally.shards, id, fun)}

  @doc "Replaces shards by those that their units fall into now, and returns these; their files are removed."
  @spec rewrite(t, [Shard.t()], reference, Plan.t(), pos_integer) ::
          {:ok, [Shard.t()], t} | {:error, Error.t()}
  def rewrite(tally, shards, output, plan, max_shard_size) do
    Enum.reduce_while(shards, {:ok, [], tally}, fn shard, {:ok, others, tally} ->
      with :ok <- Shard.remove(shard, output),
           {:ok, shards, tally} <- rewrite(tally, shard, plan, max_shard_size) do
        {:cont, {:ok, others ++ shards, tally}}
      else
        error -> {:halt, error}
      end
    end)
  end

  defp rewrite(tally, shard, plan, max_shard_size) do
    units = Shard.decided_again(shard)

    with {:ok, groups} <- Plan.shards(units, plan.file, max_shard_size) do
      shards = for {units, n} <- Enum.with_index(groups), do: Shard.new(shard.id ++ [n], units)
      {again, rows} = Map.split(tally.rows, Enum.map(shard.units, & &1.id))
      again = Map.values(again)
      others = Map.delete(tally.shards, shard.id)

      {:ok, shards,
       %{
         tally
         | rows: rows,
           tensors_done: tally.tensors_done - length(again),
           bytes_done: tally.bytes_done - sum(again, :input_bytes),
           bytes_written: tally.bytes_written - sum(again, :output_bytes),
           shards: Map.merge(others, Map.new(shards, &{&1.id, &1}))
       }}
    end
  end

  @doc "Whether nothing is left to be done: every shard is written, or lacks a unit that was put aside."
  @spec settled?(t) :: boolean
  def settled?(tally), do: Enum.all?(tally.shards, fn {_id, shard} -> Shard.settled?(shard) end)

  defp sum(rows, key), do: rows |> Enum.map(&Map.fetch!(&1, key)) |> Enum.sum()
end
