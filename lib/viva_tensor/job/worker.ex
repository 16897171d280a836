defmodule VivaTensor.Job.Worker do
  @moduledoc false
  # What the worker of a step does: a function that takes along the few terms that it
  # needs, not the whole plan.

  alias VivaTensor.{Error, Native}
  alias VivaTensor.Job.{Events, Identity, Observation, Resumption, Shard, Step, Tally, Unit}

  @doc """
  The function, and the shards with the one that it works on: the first step of a shard
  opens its file.
  """
  @spec prepare(Step.t(), map) ::
          {:ok, (() -> {:ok, term} | {:error, Error.t()}), Tally.t()} | {:error, Error.t()}
  def prepare(%{work: :plan}, %{options: options} = job) do
    {:ok, fn -> Identity.plan(options) end, job.tally}
  end

  def prepare(%{work: {:compare, left}}, job) do
    %{options: options, plan: plan, identity: identity} = job
    {:ok, fn -> Resumption.read(left, identity, plan, options) end, job.tally}
  end

  def prepare(%{work: {:search, group}, cancel: cancel}, job) do
    %{plan: %{checkpoint: %{ref: checkpoint}, work: {:quantize, spec, observed}}} = job

    choose =
      case job.found.scales do
        %{^group => chosen} ->
          fn ->
            with {:ok, notes} <-
                   Observation.use_scales(observed, checkpoint, group, chosen.scales),
                 do: {:ok, {chosen, notes}}
          end

        _ ->
          fn -> Observation.search(observed, checkpoint, spec, group, cancel) end
      end

    {:ok, choose, job.tally}
  end

  def prepare(%{work: {:unit, unit, id}, cancel: cancel} = step, job) do
    %{plan: %{checkpoint: %{ref: checkpoint}, work: work}} = job
    metadata = Events.unit(step, unit, Map.get(job, :job, self()))
    in_shard(id, job, &Unit.run(unit, checkpoint, work, &1, cancel, metadata))
  end

  def prepare(%{work: {:units, units, id}, cancel: cancel} = step, job) do
    %{plan: %{checkpoint: %{ref: checkpoint}, work: work}} = job
    units = for unit <- units, do: {unit, Events.unit(step, unit, Map.get(job, :job, self()))}

    in_shard(id, job, &{:ok, Unit.run_all(units, checkpoint, work, &1, cancel)})
  end

  def prepare(%{work: {:recall, _unit, _id, {:kept, reason}}}, job) do
    {:ok, fn -> {:ok, {:kept, reason}} end, job.tally}
  end

  def prepare(%{work: {:recall, _unit, id, {_unit_or_rows, found}}, cancel: cancel}, job) do
    in_shard(id, job, fn shard ->
      shard |> Native.unit_verify(found.parts, cancel) |> Error.wrap(:output)
    end)
  end

  def prepare(%{work: {:finish, id}}, job), do: in_shard(id, job, &Shard.finish/1)

  @doc "What another node has written and synced counts in the shard of this one as well."
  @spec accept(Step.t(), result, Tally.t()) :: result
        when result: {:ok, term} | {:error, Error.t()}
  def accept(%{node: node, work: work}, {:ok, done}, tally) when node != nil do
    parts =
      case work do
        {:unit, _unit, _id} -> elem(done, 2)
        {:recall, _unit, _id, {_unit_or_rows, found}} -> if done, do: found.parts, else: []
      end

    shard = tally.shards[elem(work, 2)].ref
    with {:ok, _} <- shard |> Native.unit_accept(parts) |> Error.wrap(:output), do: {:ok, done}
  end

  def accept(_step, result, _tally), do: result

  defp in_shard(id, %{output: output, plan: plan} = job, fun) do
    with {:ok, %{ref: ref} = shard} <- Shard.open(job.tally.shards[id], output, plan) do
      {:ok, fn -> fun.(ref) end, Tally.update(job.tally, id, fn _ -> shard end)}
    end
  end
end
