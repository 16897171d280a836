defmodule VivaTensor.Job.Machine do
  @moduledoc """
  The state machine of one job.

      planning --> scaling --> running --> finishing --> done
          |           |           |            |          ^
          `-----------`-----------`------------`--> stopping

  All work is done by steps: make the plan, choose the scales of a group of weights,
  do a unit, finish a shard. Only methods that scale columns have anything to choose. A step
  waits in the queue until there is a free worker and admission, runs in a worker
  of its own, and is tried again, a little later, when that worker dies. What a
  worker returns as an error is final: the same step would fail again.

  `stopping` waits for the workers of a failed or cancelled job to leave their
  native calls, which the cancel flag makes soon, before the output is removed.

  ## Weights that are not finite

  Room in a shard is reserved before its units run, so a weight that turns out to
  hold NaN or infinities under `non_finite: :keep` does not fit in its place. The
  unit is only noted, and when all others of its shard are done, that shard alone
  is written again with those weights kept. The second pass cannot meet others,
  so no shard is written more than twice, and a checkpoint without such weights,
  which is nearly every one, pays nothing; a pass that looks for them beforehand
  would read everything twice for all. The larger shard is cut in several if it
  would pass `max_shard_size`.
  """

  @behaviour :gen_statem

  alias VivaTensor.{Error, Native, Report, Telemetry}
  alias VivaTensor.Job.{Admission, Observation, Outputs, Plan, Publication}
  alias VivaTensor.Job.{Shard, Status, Unit, Workers}

  @attempts 3
  @backoff_ms 50
  # A finished job answers for this long; its report is on disk in any case.
  @linger_ms 600_000

  defstruct [
    :options,
    :cancel,
    :started,
    :plan,
    :output,
    :result,
    :seconds,
    queue: [],
    requested: %{},
    running: %{},
    shards: %{},
    rows: %{},
    searches: 0,
    notes: %{},
    waiting: [],
    totals: %{tensors: 0, bytes: 0},
    tensors_done: 0,
    bytes_done: 0,
    bytes_written: 0
  ]

  @impl true
  def callback_mode, do: :handle_event_function

  @impl true
  def init(options) do
    # So that terminate/3 runs, and the output goes, when a supervisor or the
    # linked caller ends.
    Process.flag(:trap_exit, true)

    data = %__MODULE__{
      options: options,
      cancel: Native.cancel_flag(),
      started: System.monotonic_time()
    }

    Telemetry.execute(
      [:viva_tensor, :job, :start],
      %{system_time: System.system_time()},
      metadata(data)
    )

    {:ok, :planning, enqueue(data, step(:plan, 0)), {:next_event, :internal, :advance}}
  end

  @impl true
  def terminate(_reason, _state, %{output: nil}), do: :ok

  def terminate(_reason, _state, data) do
    Native.cancel(data.cancel)
    Native.output_abort(data.output)
  end

  @impl true
  def handle_event({:call, from}, :status, state, data) do
    {:keep_state_and_data, {:reply, from, Status.of(state, data, data.seconds || elapsed(data))}}
  end

  def handle_event({:call, from}, :await, :done, data) do
    {:keep_state_and_data, [{:reply, from, data.result}, linger()]}
  end

  def handle_event({:call, from}, :await, _state, data) do
    {:keep_state, %{data | waiting: [from | data.waiting]}}
  end

  def handle_event({:call, from}, :cancel, :done, data) do
    {:keep_state_and_data, {:reply, from, data.result}}
  end

  def handle_event({:call, from}, :cancel, :stopping, data) do
    {:keep_state, %{data | waiting: [from | data.waiting]}}
  end

  def handle_event({:call, from}, :cancel, _state, data) do
    error = Error.new(:job, {:cancelled, %{}}, "the job was cancelled")
    stop({:error, error}, %{data | waiting: [from | data.waiting]})
  end

  def handle_event(:internal, :advance, state, data)
      when state in [:planning, :scaling, :running] do
    {:keep_state, advance(data)}
  end

  def handle_event(:internal, :publish, :finishing, data) do
    shards = data.shards |> Map.values() |> Enum.sort_by(& &1.id)
    rows = for shard <- shards, unit <- shard.units, do: Map.fetch!(data.rows, unit.id)
    data = %{data | seconds: elapsed(data)}

    case Publication.publish(data.output, data.options, data.plan, shards, rows, data.seconds) do
      {:ok, report} -> conclude({:ok, report}, %{data | output: nil})
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
    completed(state, step, result, data)
  end

  def handle_event(:info, {:DOWN, ref, :process, _pid, reason}, state, data)
      when is_map_key(data.running, ref) do
    {step, data} = returned(ref, data)
    crashed(state, step, reason, data)
  end

  def handle_event({:timeout, {:retry, _}}, step, state, data)
      when state in [:planning, :scaling, :running] do
    {:keep_state, data |> enqueue(step) |> advance()}
  end

  def handle_event(:info, {:EXIT, _pid, reason}, _state, _data) when reason != :normal do
    {:stop, reason}
  end

  def handle_event(:state_timeout, :linger, :done, _data), do: {:stop, :normal}

  # What arrives too late to matter: retries of a stopping job, grants that were
  # withdrawn, the exit of a caller that no longer waits.
  def handle_event(_type, _event, _state, _data), do: :keep_state_and_data

  # Steps

  defp step(work, bytes), do: %{work: work, bytes: bytes, attempt: 1, ticket: nil}

  defp enqueue(data, step), do: %{data | queue: [step | data.queue]}

  defp advance(%{queue: [step | queue]} = data) do
    if map_size(data.requested) + map_size(data.running) < data.options.max_concurrency do
      ticket = Admission.request(step.bytes, data.options.memory_limit)
      advance(%{data | queue: queue, requested: Map.put(data.requested, ticket, step)})
    else
      data
    end
  end

  defp advance(data), do: data

  defp start(%{work: :plan} = step, %{options: options} = data) do
    {:ok, work(step, data, fn -> Plan.make(options) end)}
  end

  defp start(%{work: {:unit, unit, id}} = step, data) do
    # The worker gets these few terms, not the whole plan.
    %{plan: %{checkpoint: %{ref: checkpoint}, work: work}, cancel: cancel} = data
    metadata = unit_metadata(step, unit)
    in_shard(id, step, data, &Unit.run(unit, checkpoint, work, &1, cancel, metadata))
  end

  defp start(%{work: {:search, group}} = step, data) do
    %{plan: %{checkpoint: %{ref: checkpoint}, work: {:quantize, spec, observed}}} = data
    cancel = data.cancel

    {:ok,
     work(step, data, fn -> Observation.search(observed, checkpoint, spec, group, cancel) end)}
  end

  defp start(%{work: {:finish, id}} = step, data), do: in_shard(id, step, data, &Shard.finish/1)

  # The first step of a shard creates its file.
  defp in_shard(id, step, data, fun) do
    case data.shards |> Map.fetch!(id) |> Shard.open(data.output, data.plan) do
      {:ok, %{ref: ref} = shard} ->
        data = %{data | shards: Map.put(data.shards, id, shard)}
        {:ok, work(step, data, fn -> fun.(ref) end)}

      {:error, error} ->
        Admission.release(step.ticket)
        {:error, error, data}
    end
  end

  defp work(step, data, fun) do
    task = Task.Supervisor.async_nolink(Workers, fun)
    %{data | running: Map.put(data.running, task.ref, step)}
  end

  defp returned(ref, data) do
    {step, running} = Map.pop!(data.running, ref)
    Admission.release(step.ticket)
    {%{step | ticket: nil}, %{data | running: running}}
  end

  defp completed(:stopping, _step, _result, data), do: stopped(data)

  defp completed(:planning, %{work: :plan}, {:ok, plan}, data), do: planned(plan, data)

  defp completed(:scaling, %{work: {:search, _group}}, {:ok, notes}, data) do
    searched(notes, data)
  end

  defp completed(:scaling, %{work: {:search, group}}, {:error, error}, data) do
    case {error.reason, data.options.recipe.non_finite} do
      {{:non_finite, _}, :keep} -> group |> Observation.not_finite() |> searched(data)
      _ -> stop({:error, error}, data)
    end
  end

  defp completed(:running, %{work: {:unit, unit, id}}, {:ok, stats}, data) do
    row = Report.row(unit, stats)
    notify(data, {:unit, row})

    %{
      data
      | rows: Map.put(data.rows, unit.id, row),
        tensors_done: data.tensors_done + 1,
        bytes_done: data.bytes_done + unit.input_bytes,
        bytes_written: data.bytes_written + row.output_bytes
    }
    |> update_shard(id, &Shard.unit_done/1)
    |> settle(id)
  end

  defp completed(:running, %{work: {:unit, unit, id}}, {:error, error}, data) do
    case {error.reason, Map.get(data.options.recipe, :non_finite)} do
      {{:non_finite, found}, :keep} ->
        reason = non_finite(found)
        notify(data, {:kept, %{name: unit.name, reason: reason}})
        data |> update_shard(id, &Shard.keep_later(&1, unit, reason)) |> settle(id)

      _ ->
        stop({:error, about(error, unit)}, data)
    end
  end

  defp completed(:running, %{work: {:finish, id}}, {:ok, written}, data) do
    data = update_shard(data, id, &%{&1 | written: written})

    if Enum.all?(data.shards, fn {_, shard} -> shard.written != nil end) do
      {:next_state, :finishing, data, {:next_event, :internal, :publish}}
    else
      {:keep_state, advance(data)}
    end
  end

  defp completed(_state, _step, {:error, error}, data), do: stop({:error, error}, data)

  defp crashed(:stopping, _step, _reason, data), do: stopped(data)

  defp crashed(_state, step, reason, data) do
    again? = step.attempt < @attempts
    what = what(step)

    with {:unit, unit, _} <- step.work do
      metadata = Map.put(unit_metadata(step, unit), :crash, reason)
      Telemetry.execute([:viva_tensor, :unit, :exception], %{duration: 0}, metadata)
    end

    if again? do
      notify(data, {:retry, %{work: what, attempt: step.attempt + 1, reason: reason}})
      delay = @backoff_ms * 2 ** (step.attempt - 1)
      retry = {{:timeout, {:retry, make_ref()}}, delay, %{step | attempt: step.attempt + 1}}
      {:keep_state, advance(data), retry}
    else
      error =
        Error.new(
          :job,
          {:worker_crashed, %{work: what, attempts: step.attempt, reason: inspect(reason)}},
          "#{what}: the worker died #{step.attempt} times, at last of #{inspect(reason)}"
        )

      stop({:error, error}, data)
    end
  end

  # Planning

  defp planned(plan, data) do
    %{to: to, force: force} = data.options
    units = Enum.concat(plan.shards)

    with {:ok, output} <- Outputs.create(to, force, plan.checkpoint.protected, data.cancel) do
      shards = for {units, n} <- Enum.with_index(plan.shards), do: Shard.new([n], units)
      bytes = units |> Enum.map(& &1.input_bytes) |> Enum.sum()
      notify(data, {:planned, %{tensors: length(units), bytes: bytes}})

      data = %{
        data
        | plan: plan,
          output: output,
          totals: %{tensors: length(units), bytes: bytes},
          shards: Map.new(shards, &{&1.id, &1}),
          searches: length(plan.groups),
          queue: for(g <- plan.groups, do: step({:search, g}, Observation.bytes(g, units)))
      }

      if data.searches == 0, do: run_units(data), else: next(:scaling, data)
    else
      {:error, error} -> stop({:error, error}, data)
    end
  end

  defp searched(notes, data) do
    data = %{data | searches: data.searches - 1, notes: Map.merge(data.notes, notes)}
    if data.searches == 0, do: run_units(data), else: {:keep_state, advance(data)}
  end

  defp run_units(data) do
    shards =
      for {id, shard} <- data.shards, into: %{} do
        {id, %{shard | units: Enum.map(shard.units, &Observation.annotate(&1, data.notes))}}
      end

    queue = shards |> Map.values() |> Enum.sort_by(& &1.id) |> Enum.flat_map(&steps/1)
    next(:running, %{data | shards: shards, queue: queue, notes: %{}})
  end

  defp next(state, data), do: {:next_state, state, data, {:next_event, :internal, :advance}}

  defp steps(%Shard{units: []} = shard), do: [step({:finish, shard.id}, 0)]

  defp steps(%Shard{} = shard) do
    for unit <- shard.units, do: step({:unit, unit, shard.id}, Unit.bytes(unit))
  end

  # Shards

  defp update_shard(data, id, fun), do: %{data | shards: Map.update!(data.shards, id, fun)}

  # A shard whose units are all done is finished, or written again.
  defp settle(data, id) do
    case Map.fetch!(data.shards, id) do
      %{remaining: 0, non_finite: none} when none == %{} ->
        {:keep_state, data |> enqueue(step({:finish, id}, 0)) |> advance()}

      %{remaining: 0} = shard ->
        case rewrite(shard, data) do
          {:ok, data} -> {:keep_state, advance(data)}
          {:error, error} -> stop({:error, error}, data)
        end

      _ ->
        {:keep_state, advance(data)}
    end
  end

  defp rewrite(shard, data) do
    with :ok <- Shard.remove(shard, data.output),
         units = Shard.decided_again(shard),
         {:ok, groups} <- Plan.shards(units, data.plan.file, data.options.max_shard_size) do
      shards = for {units, n} <- Enum.with_index(groups), do: Shard.new(shard.id ++ [n], units)
      {again, rows} = Map.split(data.rows, Enum.map(shard.units, & &1.id))
      again = Map.values(again)

      {:ok,
       %{
         data
         | rows: rows,
           tensors_done: data.tensors_done - length(again),
           bytes_done: data.bytes_done - sum(again, :input_bytes),
           bytes_written: data.bytes_written - sum(again, :output_bytes),
           shards:
             data.shards |> Map.delete(shard.id) |> Map.merge(Map.new(shards, &{&1.id, &1})),
           queue: Enum.flat_map(shards, &steps/1) ++ data.queue
       }}
    end
  end

  defp sum(rows, key), do: rows |> Enum.map(&Map.fetch!(&1, key)) |> Enum.sum()

  # The end

  defp stop(result, data) do
    Native.cancel(data.cancel)
    data.requested |> Map.keys() |> Enum.each(&Admission.release/1)
    data = %{data | result: result, queue: [], requested: %{}, seconds: elapsed(data)}

    if data.running == %{} do
      stopped(data)
    else
      notify(data, {:state, :stopping})
      {:next_state, :stopping, data}
    end
  end

  defp stopped(%{running: running} = data) when map_size(running) > 0, do: {:keep_state, data}

  defp stopped(data) do
    if data.output, do: Native.output_abort(data.output)
    conclude(data.result, %{data | output: nil})
  end

  defp conclude(result, data) do
    duration = System.monotonic_time() - data.started

    case result do
      {:ok, report} ->
        measurements = %{
          duration: duration,
          input_bytes: report.input_bytes,
          output_bytes: report.output_bytes
        }

        Telemetry.execute([:viva_tensor, :job, :stop], measurements, metadata(data))

      {:error, error} ->
        metadata = Map.put(metadata(data), :error, error)
        Telemetry.execute([:viva_tensor, :job, :exception], %{duration: duration}, metadata)
    end

    notify(data, {:done, result})
    replies = for from <- data.waiting, do: {:reply, from, result}
    # The plan holds the mapped source and the shards: nothing needs them now.
    data = %{data | result: result, waiting: [], plan: nil, shards: %{}, rows: %{}}
    {:next_state, :done, data, replies ++ [linger(), :hibernate]}
  end

  defp linger, do: {:state_timeout, @linger_ms, :linger}

  # What others see

  defp notify(%{options: %{notify: nil}}, _event), do: :ok
  defp notify(%{options: %{notify: pid}}, event), do: send(pid, {:viva_tensor_job, self(), event})

  defp elapsed(data) do
    System.convert_time_unit(System.monotonic_time() - data.started, :native, :microsecond) /
      1.0e6
  end

  defp metadata(%{options: options}) do
    %{
      job: self(),
      source: options.source,
      to: options.to,
      format: Map.get(options.recipe, :format),
      layout: options.recipe.layout
    }
  end

  defp unit_metadata(step, unit) do
    %{job: self(), name: unit.name, action: unit.action, attempt: step.attempt}
  end

  defp what(%{work: :plan}), do: "the plan"
  defp what(%{work: {:search, {into, _, _}}}), do: "the scales of #{into}"
  defp what(%{work: {:finish, id}}), do: "shard #{Enum.join(id, "-")}"
  defp what(%{work: {:unit, unit, _}}), do: unit.name

  defp non_finite(%{nan: nan, inf: inf}), do: "#{nan} NaN and #{inf} infinite values"

  # An error of a unit names its tensor.
  defp about(%Error{reason: {kind, details}} = error, unit) do
    Error.new(
      error.op,
      {kind, Map.put(details, :tensor, unit.name)},
      "#{unit.name}: #{error.message}"
    )
  end
end
