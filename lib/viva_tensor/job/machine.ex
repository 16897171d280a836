defmodule VivaTensor.Job.Machine do
  @moduledoc false
  # The state machine of one job.
  #
  #     planning --> scaling --> running --> finishing --> done
  #         |           |           |            |          ^
  #         `-----------`-----------`------------`--> stopping
  #
  # All work is done by steps (`VivaTensor.Job.Step`). Only methods that scale columns
  # have anything to choose in `scaling`. A step waits in the queue until there is a free
  # worker and admission, and runs in a worker of its own. What a finished unit is
  # known again by goes into the manifest (`VivaTensor.Job.Ledger`), and work does not
  # run far ahead of that: a job that is killed has to do again no more than its largest
  # unit for each worker.
  #
  # ## What fails
  #
  # A worker that dies, a unit that takes longer than `unit_timeout` and a tensor that
  # cannot be done are tried again, a little later each time. A unit that failed three
  # times is put aside and the job goes on, to end as partial. Errors of files end the
  # job: the next unit would meet them too.
  #
  # A unit that takes too long is asked to leave by its cancel flag and, if it does not,
  # its worker is killed. The native call may go on after that; its memory stays counted
  # until it returns, and what it still writes is what the next attempt writes there too.
  #
  # `stopping` waits for the workers of a failed or cancelled job to leave their native
  # calls, which the cancel flags make soon, and records what is finished.

  @behaviour :gen_statem

  alias VivaTensor.{Error, Native}
  alias VivaTensor.Job.{Admission, Events, Failure, Finished, Identity, Ledger, Members}
  alias VivaTensor.Job.{Observation, Outputs, Placement, Publication, Ranges, Resumption}
  alias VivaTensor.Job.{Shard, Status, Step, Tally, Unit, Worker}

  @attempts 3
  @backoff_ms 50
  # What a worker has to leave its native call after it was told to.
  @grace_ms 1_000
  # A finished job answers for this long; its report is on disk in any case.
  @linger_ms 600_000

  defstruct [
    :options,
    :started,
    :plan,
    :identity,
    :output,
    :result,
    :seconds,
    :recording,
    ledger: %Ledger{},
    found: %Resumption{},
    tally: %Tally{},
    members: %Members{},
    queue: [],
    requested: %{},
    running: %{},
    ranges: %{},
    largest: 0,
    searches: 0,
    notes: %{},
    waiting: [],
    subscribers: []
  ]

  @impl true
  def callback_mode, do: :handle_event_function

  @impl true
  def init(options) do
    # So that terminate/3 runs, and the output is let go, when a supervisor or the
    # linked caller ends.
    Process.flag(:trap_exit, true)
    subscribers = List.wrap(options.notify)
    started = System.monotonic_time()
    data = %__MODULE__{options: options, started: started, subscribers: subscribers}
    Events.started(options)
    {:ok, :planning, enqueue(data, Step.new(:plan)), {:next_event, :internal, :advance}}
  end

  @impl true
  def terminate(_reason, _state, data) do
    for {_ref, step} <- data.running, do: Step.cancel(step)
    if data.output, do: Native.output_release(data.output)
    :ok
  end

  @impl true
  def handle_event({:call, from}, :status, state, data) do
    {:keep_state_and_data, {:reply, from, Status.of(state, data, data.seconds || elapsed(data))}}
  end

  def handle_event({:call, {pid, _} = from}, :subscribe, state, data) do
    Process.monitor(pid)
    status = Status.of(state, data, data.seconds || elapsed(data))
    data = %{data | subscribers: Enum.uniq([pid | data.subscribers])}
    {:keep_state, data, {:reply, from, status}}
  end

  def handle_event({:call, from}, _await_or_cancel, :done, data) do
    {:keep_state_and_data, [{:reply, from, data.result}, linger()]}
  end

  def handle_event({:call, from}, call, state, data) do
    data = %{data | waiting: [from | data.waiting]}
    if call == :cancel and state != :stopping, do: cancel(data), else: {:keep_state, data}
  end

  def handle_event(:cast, :cancel, state, data) when state not in [:stopping, :done] do
    cancel(data)
  end

  def handle_event(:internal, :advance, state, data)
      when state in [:planning, :scaling, :running] do
    {:keep_state, Placement.advance(data)}
  end

  def handle_event(:internal, :publish, :finishing, data) do
    data = %{data | seconds: elapsed(data)}

    with :ok <- Identity.same_source(data.identity, data.plan),
         {:ok, report} <- Publication.publish(data) do
      conclude({:ok, report}, %{data | output: nil})
    else
      {:error, error} -> stop({:error, error}, data)
    end
  end

  def handle_event(:info, {:admitted, ticket}, _state, data) do
    case Map.pop(data.requested, ticket) do
      {nil, _} ->
        :keep_state_and_data

      {step, requested} ->
        case start(%{step | ticket: ticket}, %{data | requested: requested}) do
          {:ok, data} -> {:keep_state, data}
          {:error, error, data} -> stop({:error, error}, data)
        end
    end
  end

  def handle_event(:info, {ref, result}, state, data) when is_map_key(data.running, ref) do
    Process.demonitor(ref, [:flush])
    {step, data} = returned(ref, data)
    ended(state, step, Worker.accept(step, result, data.tally), data)
  end

  def handle_event(:info, {:DOWN, ref, :process, _pid, reason}, state, data)
      when is_map_key(data.running, ref) do
    # The native call of a killed worker goes on.
    Step.cancel(data.running[ref])

    {step, data} = returned(ref, data)
    ended(state, step, {:died, reason}, data)
  end

  def handle_event(:info, {:overdue, ref}, _state, data) when is_map_key(data.running, ref) do
    step = data.running[ref]
    Step.cancel(step)
    timer = Process.send_after(self(), {:kill, ref}, @grace_ms)
    {:keep_state, put_in(data.running[ref], %{step | overdue: true, timer: timer})}
  end

  def handle_event(:info, {:kill, ref}, _state, data) when is_map_key(data.running, ref) do
    Step.kill(data.running[ref])
    :keep_state_and_data
  end

  def handle_event(:info, {:began, ref, pid}, _state, data) when is_map_key(data.running, ref) do
    step = Step.began(data.running[ref], pid, ref, data.options.unit_timeout)
    {:keep_state, put_in(data.running[ref], step)}
  end

  def handle_event(:info, {ref, result}, state, %{recording: {ref, _attempt}} = data) do
    Process.demonitor(ref, [:flush])
    recorded(state, result, %{data | recording: nil})
  end

  def handle_event(:info, {:DOWN, ref, _, _, reason}, state, %{recording: {ref, n}} = data) do
    if n < @attempts do
      {:keep_state, begin_write(Ledger.again(data.ledger), n + 1, data)}
    else
      recorded(state, {:error, Failure.final("the manifest", n, reason)}, %{data | recording: nil})
    end
  end

  def handle_event({:timeout, {:retry, _}}, step, state, data)
      when state in [:planning, :scaling, :running] do
    if Ranges.fate(data.ranges, step),
      do: :keep_state_and_data,
      else: {:keep_state, data |> enqueue(step) |> Placement.advance()}
  end

  def handle_event(:info, message, _state, data) when elem(message, 0) != :EXIT do
    case {Members.handle(message, data.members, data.running), message} do
      {{members, told}, _} ->
        Events.nodes(data, told)
        {:keep_state, Placement.advance(%{data | members: members})}

      # Of a worker whose result came first, or a subscriber.
      {:unknown, {:DOWN, _ref, :process, pid, _reason}} ->
        {:keep_state, %{data | subscribers: List.delete(data.subscribers, pid)}}

      {:unknown, _late} ->
        :keep_state_and_data
    end
  end

  def handle_event(:info, {:EXIT, _pid, reason}, _state, _data) when reason != :normal do
    {:stop, reason}
  end

  def handle_event(:state_timeout, :linger, :done, _data), do: {:stop, :normal}

  def handle_event(:state_timeout, :kill, :stopping, data) do
    for {_ref, step} <- data.running, do: Step.kill(step)
    :keep_state_and_data
  end

  # What arrives too late to matter: retries of a stopping job, grants that were
  # withdrawn, the exit of a caller that no longer waits.
  def handle_event(_type, _event, _state, _data), do: :keep_state_and_data

  # Steps

  defp enqueue(data, step), do: %{data | queue: [step | data.queue]}

  defp start(step, data) do
    case Worker.prepare(step, data) do
      {:ok, fun, tally} ->
        {ref, step} = Step.begin(step, fun, data.options.unit_timeout, data.running)
        {:ok, %{data | tally: tally, running: Map.put(data.running, ref, step)}}

      {:error, error} ->
        Admission.release(step.ticket)
        {:error, error, data}
    end
  end

  defp returned(ref, data) do
    {step, running} = Map.pop!(data.running, ref)
    if step.ticket, do: Admission.release(step.ticket)
    {Step.ended(step), %{data | running: running}}
  end

  defp ended(state, step, result, data) do
    failure = Step.failure(step, result, data.options.unit_timeout)

    case {Ranges.fate(data.ranges, step), failure} do
      {nil, nil} -> completed(state, step, result, data)
      {nil, {:failed, reason}} -> failed(state, step, reason, data)
      # The rest of a tensor that is put aside, or has to be kept.
      _ when state == :stopping -> stopped(data)
      {fate, _} -> give_up(fate, step.work, data)
    end
  end

  defp completed(:stopping, %{work: {:unit, unit, _}} = step, {:ok, done}, data),
    do: data |> Finished.unit(unit, step, done) |> stopped()

  defp completed(:stopping, %{work: {:units, _, _}} = step, {:ok, results}, data),
    do: data |> Finished.units(results, step) |> stopped()

  defp completed(:stopping, _step, _result, data), do: stopped(data)

  defp completed(:planning, %{work: :plan}, {:ok, {plan, identity}}, data) do
    planned(%{data | plan: plan, identity: identity})
  end

  defp completed(:planning, %{work: {:compare, _}}, {:ok, found}, data), do: begin(found, data)

  defp completed(:scaling, %{work: {:search, group}}, {:ok, {chosen, notes}}, data) do
    searched(notes, chosen(group, chosen, data))
  end

  defp completed(:scaling, %{work: {:search, group}} = step, {:error, error}, data) do
    case error.reason do
      {:non_finite, _} -> group |> Observation.not_finite() |> searched(data)
      _ -> completed(:any, step, {:error, error}, data)
    end
  end

  defp completed(:running, %{work: {:unit, unit, id}} = step, {:ok, done}, data),
    do: data |> Finished.unit(unit, step, done) |> settle(id)

  defp completed(:running, %{work: {:units, _units, id}} = step, {:ok, results}, data) do
    again = for {unit, _times, {:error, _}} <- results, do: Step.unit(unit, id)
    data = Finished.units(data, results, step)
    settle(%{data | queue: again ++ data.queue}, id)
  end

  defp completed(:running, %{work: {:unit, unit, id}} = step, {:error, error}, data) do
    case {error.reason, Map.get(data.options.recipe, :non_finite)} do
      {{:non_finite, found}, :keep} ->
        reason = Failure.non_finite(found)
        Events.notify(data, {:kept, %{name: unit.name, reason: reason}})

        data = %{data | ledger: Ledger.add(data.ledger, {:kept, id, unit.name, reason})}
        fate = {:keep, reason}
        give_up(fate, step.work, Ranges.close(data, unit, fate))

      {{kind, _}, _} when kind in [:io, :invalid_file, :cancelled] and step.node == nil ->
        stop({:error, Failure.about(error, unit)}, data)

      _ ->
        failed(:running, step, error, data)
    end
  end

  # What an earlier job recorded counts if it is still there.
  defp completed(:running, %{work: {:recall, unit, id, {_, _} = was}} = step, {:ok, true}, data),
    do: data |> Finished.verified(unit, step, was) |> settle(id)

  defp completed(:running, %{work: {:recall, unit, id, _found}}, {:ok, false}, data) do
    Events.notify(data, {:redo, %{name: unit.name}})
    queue = Step.tensor(unit, id) ++ data.queue
    {:keep_state, Placement.advance(%{data | queue: queue})}
  end

  defp completed(:running, %{work: {:recall, _, _, _} = work}, {:ok, {:kept, reason}}, data),
    do: give_up({:keep, reason}, work, data)

  defp completed(:running, %{work: {:finish, id}}, {:ok, written}, data) do
    %{data | tally: Tally.update(data.tally, id, &%{&1 | written: written})} |> go_on()
  end

  # Another node may not see what this one does.
  defp completed(:running, %{node: node} = step, {:error, error}, data) when node != nil do
    failed(:running, step, error, data)
  end

  defp completed(_state, _step, {:error, error}, data), do: stop({:error, error}, data)

  defp failed(:stopping, _step, _reason, data), do: stopped(data)

  defp failed(_state, step, reason, data) do
    Events.failed(step, reason)

    case step do
      %{work: {:units, _, _}} ->
        queue = Step.apart(step) ++ data.queue
        {:keep_state, Placement.advance(%{data | queue: queue})}

      %{attempt: attempt} when attempt < @attempts ->
        what = %{work: Step.name(step), attempt: attempt + 1, reason: reason}
        Events.notify(data, {:retry, what})
        delay = @backoff_ms * 2 ** (attempt - 1)
        retry = {{:timeout, {:retry, make_ref()}}, delay, Step.again(step)}
        {:keep_state, Placement.advance(data), retry}

      %{work: {:unit, _, _}} ->
        quarantine(step, reason, data)

      _ ->
        stop({:error, Failure.final(Step.name(step), step.attempt, reason)}, data)
    end
  end

  defp quarantine(step, reason, data) do
    {:unit, unit, _id} = step.work
    why = %{name: unit.name, reason: Failure.text(reason), attempts: step.attempt}
    Events.quarantined(data, why)
    fate = {:put_aside, why}
    give_up(fate, step.work, Ranges.close(data, unit, fate))
  end

  # Not before the last of its ranges has left.
  defp give_up(fate, work, data) do
    {unit, id} = {elem(work, 1), elem(work, 2)}

    if Ranges.leaving?(data, unit),
      do: {:keep_state, Placement.advance(data)},
      else: settle(%{data | tally: Tally.give_up(data.tally, id, unit, fate)}, id)
  end

  # Planning

  defp planned(data) do
    case Outputs.open(data.options, data.plan.checkpoint.protected) do
      {:ok, output, {:nothing, _}} ->
        found = Resumption.none(data.identity, data.plan, data.options)
        begin(found, %{data | output: output})

      {:ok, output, left} ->
        step = Step.new({:compare, left})
        {:keep_state, %{data | output: output} |> enqueue(step) |> Placement.advance()}

      {:error, error} ->
        done_already(error, data)
    end
  end

  # Going on with what is complete changes nothing.
  defp done_already(%Error{reason: {:io, %{code: "eexist"}}} = error, data)
       when data.options.resume do
    case Publication.published(data.options, data.identity) do
      {:ok, report} -> conclude({:ok, report}, %{data | seconds: elapsed(data)})
      :error -> stop({:error, error}, data)
    end
  end

  defp done_already(error, data), do: stop({:error, error}, data)

  # It was all there: only the report is to be told.
  defp begin(%{published: %{} = fields}, data) do
    case Publication.clean_up(data.output, data.options, fields) do
      {:ok, report} -> conclude({:ok, report}, %{data | output: nil, seconds: elapsed(data)})
      {:error, error} -> stop({:error, error}, data)
    end
  end

  defp begin(found, %{plan: plan} = data) do
    units = Enum.concat(plan.shards)
    shards = for {units, n} <- Enum.with_index(plan.shards), do: Shard.new([n], units)
    tally = Tally.new(shards)
    Events.notify(data, {:planned, %{tensors: tally.tensors, bytes: tally.bytes}})
    queue = for g <- plan.groups, do: Step.new({:search, g}, Observation.bytes(g, units))
    ledger = Ledger.new(found.head, found.at)
    data = %{data | found: found, ledger: ledger, tally: tally, queue: queue}
    largest = Enum.max(for(u <- units, part <- Unit.ranges(u), do: part.input_bytes), fn -> 0 end)
    data = %{data | largest: largest, searches: length(plan.groups)}
    if data.searches == 0, do: run_units(data), else: next(:scaling, data)
  end

  defp chosen(group, chosen, %{found: found} = data) do
    if is_map_key(found.scales, group) do
      data
    else
      ledger = Ledger.add(data.ledger, {:scales, group, chosen})
      scales = Map.put(found.scales, group, chosen)
      record(%{data | found: %{found | scales: scales}, ledger: ledger})
    end
  end

  defp searched(notes, data) do
    data = %{data | searches: data.searches - 1, notes: Map.merge(data.notes, notes)}
    if data.searches == 0, do: run_units(data), else: {:keep_state, Placement.advance(data)}
  end

  defp run_units(data) do
    data = %{data | tally: Tally.annotate(data.tally, data.notes), notes: %{}}

    # What an earlier job wrote again is not written as it was at first.
    {again, once} =
      data.tally |> Tally.in_order() |> Enum.split_with(&is_map_key(data.found.rewritten, &1.id))

    queue = Enum.flat_map(once, &Step.all(&1, data.found.units))
    again = for shard <- again, do: %{shard | non_finite: data.found.rewritten[shard.id]}

    case rewrite(again, %{data | queue: queue}) do
      {:ok, data} -> next(:running, %{data | members: Members.invite(data)})
      {:error, error} -> stop({:error, error}, data)
    end
  end

  defp next(state, data), do: {:next_state, state, data, {:next_event, :internal, :advance}}

  # Shards

  # A shard whose units are all done is finished, or written again once that is
  # recorded.
  defp settle(data, id) do
    shard = Map.fetch!(data.tally.shards, id)

    case Shard.next(shard) do
      :finish ->
        data |> enqueue(Step.new({:finish, id})) |> go_on()

      :rewrite ->
        record = {:rewritten, id, shard.non_finite}
        go_on(%{data | ledger: Ledger.add(data.ledger, record)})

      _ ->
        go_on(data)
    end
  end

  defp rewrite(shards, data) do
    size = data.options.max_shard_size

    with {:ok, shards, tally} <- Tally.rewrite(data.tally, shards, data.output, data.plan, size) do
      queue = Enum.flat_map(shards, &Step.all(&1, data.found.units)) ++ data.queue
      {:ok, %{data | tally: tally, queue: queue}}
    end
  end

  # The manifest

  defp record(%{recording: nil} = data) do
    case Ledger.next(data.ledger) do
      {write, ledger} -> begin_write(write, 1, %{data | ledger: ledger})
      :nothing -> data
    end
  end

  defp record(data), do: data

  defp begin_write(write, attempt, data) do
    %{data | recording: {Ledger.begin(write, data.output), attempt}}
  end

  defp recorded(:stopping, {:ok, _}, data) do
    {_records, ledger} = Ledger.written(data.ledger)
    stopped(%{data | ledger: ledger})
  end

  defp recorded(:stopping, {:error, _}, data),
    do: stopped(%{data | ledger: %Ledger{at: data.ledger.at}})

  defp recorded(_state, {:ok, _}, data) do
    {records, ledger} = Ledger.written(data.ledger)
    again = for {:rewritten, id, _kept} <- records, do: Map.fetch!(data.tally.shards, id)

    case rewrite(again, %{data | ledger: ledger}) do
      {:ok, data} -> go_on(data)
      {:error, error} -> stop({:error, error}, data)
    end
  end

  defp recorded(_state, {:error, error}, data) do
    stop({:error, error}, %{data | ledger: %Ledger{at: data.ledger.at}})
  end

  defp go_on(data) do
    data = record(data)

    cond do
      not (Ledger.idle?(data.ledger) and Tally.settled?(data.tally)) ->
        {:keep_state, Placement.advance(data)}

      data.tally.quarantined == %{} ->
        {:next_state, :finishing, data, {:next_event, :internal, :publish}}

      true ->
        partial(%{data | seconds: elapsed(data)})
    end
  end

  # The end

  defp partial(data) do
    case Publication.put_aside(data) do
      {:ok, report} -> conclude({:partial, report}, %{data | output: nil})
      {:error, error} -> stop({:error, error}, data)
    end
  end

  defp cancel(data) do
    stop({:error, Error.new(:job, {:cancelled, %{}}, "the job was cancelled")}, data)
  end

  defp stop(result, data) do
    for {_ref, step} <- data.running, do: Step.cancel(step)
    data.requested |> Map.keys() |> Enum.each(&Admission.release/1)
    data = %{data | result: result, queue: [], requested: %{}, seconds: elapsed(data)}

    case stopped(data) do
      {:keep_state, data} ->
        Events.notify(data, {:state, :stopping})
        {:next_state, :stopping, data, {:state_timeout, @grace_ms, :kill}}

      done ->
        done
    end
  end

  # What is finished is recorded, unless that is what failed.
  defp stopped(%{running: running} = data) when map_size(running) > 0, do: {:keep_state, data}

  defp stopped(data) do
    data = record(data)

    if data.recording do
      {:keep_state, data}
    else
      if data.output, do: Native.output_release(data.output)
      conclude(data.result, %{data | output: nil})
    end
  end

  defp conclude(result, data) do
    Events.ended(data.options, result, System.monotonic_time() - data.started)
    Events.notify(data, {:done, result})
    members = Members.dismiss(data.members)
    replies = for from <- data.waiting, do: {:reply, from, result}
    # The plan holds the mapped source and the shards: nothing needs them now.
    tally = %{data.tally | shards: %{}}
    data = %{data | result: result, waiting: [], plan: nil, tally: tally, found: nil}
    data = %{data | members: members, ranges: %{}}
    {:next_state, :done, data, replies ++ [linger(), :hibernate]}
  end

  defp linger, do: {:state_timeout, @linger_ms, :linger}

  defp elapsed(data) do
    System.convert_time_unit(System.monotonic_time() - data.started, :native, :microsecond) /
      1.0e6
  end
end
