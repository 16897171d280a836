defmodule VivaTensor.Job.Tally do
  @moduledoc false
  # How the units and shards of a job stand.

  alias VivaTensor.{Error, Report}
  alias VivaTensor.Job.{Manifest, Observation, Plan, Ranges, Shard, Unit}

  defstruct shards: %{},
            quarantined: %{},
            tensors: 0,
            bytes: 0,
            tensors_done: 0,
            bytes_done: 0,
            bytes_written: 0

  @typedoc "Tensors, bytes read and bytes written."
  @type counts :: {non_neg_integer, non_neg_integer, non_neg_integer}

  @typedoc """
  Units that are `quarantined` are by their ids.
  """
  @type t :: %__MODULE__{
          shards: %{Manifest.shard() => Shard.t()},
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

  @doc "The units that were put aside, in the order of the source."
  @spec quarantined(t) :: [Report.quarantined()]
  def quarantined(tally), do: tally.quarantined |> Enum.sort() |> Enum.map(&elem(&1, 1))

  @doc "What was found out about units is noted in them."
  @spec annotate(t, %{String.t() => String.t()}) :: t
  def annotate(tally, notes) do
    annotated = &%{&1 | units: Enum.map(&1.units, fn u -> Observation.annotate(u, notes) end)}
    %{tally | shards: Map.new(tally.shards, fn {id, shard} -> {id, annotated.(shard)} end)}
  end

  @doc "A tensor is done."
  @spec done(t, Manifest.shard(), Report.row()) :: t
  # Its ranges were counted.
  def done(tally, id, %{ranges: _}), do: one_less(tally, id, {1, 0, 0})
  def done(tally, id, row), do: one_less(tally, id, {1, row.input_bytes, row.output_bytes})

  defp one_less(tally, id, counts),
    do: tally |> add(id, counts) |> update(id, &Shard.one_less/1)

  @doc "So many tensors more are done, for which so many bytes were read and written."
  @spec add(t, Manifest.shard(), counts) :: t
  def add(tally, id, {units, read, written} = counts) do
    tally
    |> count(counts)
    |> update(id, fn %{done: {u, r, w}} = shard ->
      %{shard | done: {u + units, r + read, w + written}}
    end)
  end

  defp count(tally, {units, read, written}) do
    %{
      tally
      | tensors_done: tally.tensors_done + units,
        bytes_done: tally.bytes_done + read,
        bytes_written: tally.bytes_written + written
    }
  end

  @doc "A unit's weight has to be kept after all, or the unit is put aside."
  @spec give_up(t, Manifest.shard(), Unit.t(), Ranges.fate()) :: t
  def give_up(tally, id, unit, {:keep, reason}),
    do: update(tally, id, &Shard.keep_later(&1, unit, reason))

  def give_up(tally, id, unit, {:put_aside, why}) do
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
      {units, read, written} = shard.done
      others = Map.delete(tally.shards, shard.id)
      tally = %{tally | shards: Map.merge(others, Map.new(shards, &{&1.id, &1}))}
      {:ok, shards, count(tally, {-units, -read, -written})}
    end
  end

  @doc "Whether nothing is left to be done: every shard is written, or lacks a unit that was put aside."
  @spec settled?(t) :: boolean
  def settled?(tally), do: Enum.all?(tally.shards, fn {_id, shard} -> Shard.settled?(shard) end)
end
