defmodule VivaTensor.Job.Placement do
  @moduledoc false
  # Which steps of a job begin next, and on which node.
  #
  # The first of the queue begins here where a worker is free, and otherwise the first that
  # others can do goes to the node with the most free workers. Nothing begins while what
  # a killed job would have to do again exceeds its largest unit for each worker: until then
  # work runs ahead of the manifest, so that one sync serves many units.

  alias VivaTensor.Job.{Admission, Ledger, Members, Options, Shard, Step, Tally}

  # What a killed job may have to do again for each worker, however small the units
  # are: syncing each of them would take longer.
  @small_bytes 256 * 1024
  # Steps that only this node does may be ahead of some for others.
  @looked_at 32

  @doc "The job after asking admission for what can begin here, and sending what others can do."
  @spec advance(job) :: job when job: map
  def advance(job) do
    case next(job) do
      {:here, step, queue} -> %{job | queue: queue} |> request(step) |> advance()
      {node, step, queue} -> %{job | queue: queue} |> send_step(node, step) |> advance()
      nil -> job
    end
  end

  defp request(job, step) do
    step = Step.armed(step)
    %{memory_limit: limit, priority: priority} = job.options
    ticket = Admission.request(step.bytes, limit, step.cancel, priority)
    %{job | requested: Map.put(job.requested, ticket, step)}
  end

  # Its file has to be there first; what keeps it from being opened is told here.
  defp send_step(job, node, %{work: work} = step) do
    id = elem(work, 2)

    case Shard.open(job.tally.shards[id], job.output, job.plan) do
      {:ok, shard} ->
        {ref, step} = Members.send_step(job.members, node, step, shard.mark, job.running)
        tally = Tally.update(job.tally, id, fn _ -> shard end)
        %{job | tally: tally, running: Map.put(job.running, ref, step)}

      {:error, _} ->
        request(job, step)
    end
  end

  defp next(%{queue: []}), do: nil

  defp next(%{queue: queue, members: members} = job) do
    busy = Map.values(job.requested) ++ Map.values(job.running)
    {away, here} = Enum.split_with(busy, & &1.node)
    workers = Options.workers(job.options)

    with {place, index} <- place(length(here) < workers, queue, members, away),
         {step, rest} = List.pop_at(queue, index),
         risk = (workers + Members.workers(members)) * max(job.largest, @small_bytes),
         at_stake = Ledger.unrecorded(job.ledger) + Step.at_stake(busy),
         # A tensor that is kept after all may be larger than any unit was: it goes alone.
         true <- at_stake == 0 or at_stake + Step.at_stake([step]) <= risk do
      {place, step, rest}
    else
      _ -> nil
    end
  end

  defp place(true, _queue, _members, _away), do: {:here, 0}

  defp place(false, queue, members, away) do
    with node when node != nil <- Members.free(members, away),
         index when index != nil <-
           queue |> Enum.take(@looked_at) |> Enum.find_index(&Members.can_do?/1),
         do: {node, index}
  end
end
