defmodule VivaTensor.Job.Vectors do
  @moduledoc false
  # The state machine of a job that compresses vectors.
  #
  #     planning --> running --> finishing --> done
  #         |           |            |          ^
  #         `-----------`------------`--> stopping
  #
  # It speaks to others as `VivaTensor.Job.Machine` does; what it has done is different. A
  # checkpoint's units are known beforehand and done in any order. Vectors come one after
  # the other, perhaps without end, so that one worker takes them piece by piece
  # (`VivaTensor.Job.Vectors.Worker`), each piece with all native threads.
  #
  # A worker that dies is started anew, up to three times in all, and goes on with what is
  # recorded, if its vectors are in a file: a stream cannot be asked for its elements again.

  @behaviour :gen_statem

  alias VivaTensor.{Error, Native}
  alias VivaTensor.Job.{Events, Failure, Members, Outputs, Status, Step, Tally}
  alias VivaTensor.Job.{Unit, Workers}
  alias VivaTensor.Job.Vectors.Worker

  @attempts 3
  # What a worker has to leave its native call, or its stream, after it was told to.
  @grace_ms 1_000
  # A finished job answers for this long; its report is on disk in any case.
  @linger_ms 600_000

  defstruct [
    :options,
    :started,
    :output,
    :found,
    :task,
    :cancel,
    :result,
    :seconds,
    attempt: 0,
    workers: [],
    vectors: 0,
    of: nil,
    tally: %Tally{},
    members: %Members{},
    running: %{},
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
    {:ok, :planning, work(data)}
  end

  @impl true
  def terminate(_reason, _state, data) do
    Native.cancel(data.cancel)
    if data.output, do: Native.output_release(data.output)
    :ok
  end

  @doc "The unfinished output, and what an earlier job left in it: for the worker, once it has seen the source."
  @spec begin(pid, map) :: {:ok, reference, Outputs.found()} | {:error, Error.t()}
  def begin(job, facts), do: :gen_statem.call(job, {:begin, facts}, :infinity)

  @doc "Tells of a piece that is begun, or done: then with its row."
  @spec tell(pid, {:piece, Unit.t()} | {:done, map, atom} | {:redo, map} | :finishing) :: :ok
  def tell(job, what), do: :gen_statem.cast(job, {:tell, self(), what})

  @impl true
  def handle_event({:call, from}, :status, state, data) do
    {:keep_state_and_data, {:reply, from, status(state, data)}}
  end

  def handle_event({:call, {pid, _} = from}, :subscribe, state, data) do
    Process.monitor(pid)
    data = %{data | subscribers: Enum.uniq([pid | data.subscribers])}
    {:keep_state, data, {:reply, from, status(state, data)}}
  end

  def handle_event({:call, from}, request, :done, data) when request in [:await, :cancel] do
    {:keep_state_and_data, [{:reply, from, data.result}, linger()]}
  end

  def handle_event({:call, from}, :await, _state, data) do
    {:keep_state, %{data | waiting: [from | data.waiting]}}
  end

  def handle_event({:call, from}, :cancel, state, data) do
    data = %{data | waiting: [from | data.waiting]}
    if state == :stopping, do: {:keep_state, data}, else: stop(data)
  end

  def handle_event(:cast, :cancel, state, data) when state not in [:stopping, :done] do
    stop(data)
  end

  def handle_event({:call, from}, {:begin, _facts}, :stopping, _data) do
    {:keep_state_and_data, {:reply, from, {:error, cancelled()}}}
  end

  def handle_event({:call, from}, {:begin, facts}, _state, %{output: nil} = data) do
    case Outputs.open(data.options, facts.protected) do
      {:ok, output, found} ->
        tally = %{data.tally | tensors: facts.pieces, bytes: facts.bytes}
        data = %{data | output: output, found: found, tally: tally, of: facts.vectors}
        Events.notify(data, {:planned, %{tensors: facts.pieces, bytes: facts.bytes}})
        {:next_state, :running, data, {:reply, from, {:ok, output, found}}}

      {:error, error} ->
        {:keep_state_and_data, {:reply, from, {:error, error}}}
    end
  end

  # A worker that was started anew: what its predecessor recorded is there.
  def handle_event({:call, from}, {:begin, _facts}, _state, data) do
    {_, manifest} = data.found
    found = {if(File.exists?(manifest), do: :unfinished, else: :nothing), manifest}
    {:keep_state_and_data, {:reply, from, {:ok, data.output, found}}}
  end

  def handle_event(:cast, {:tell, pid, what}, state, %{task: %{pid: pid}} = data)
      when state != :done do
    told(what, state, data)
  end

  def handle_event(:info, {ref, result}, state, %{task: %{ref: ref}} = data) do
    Process.demonitor(ref, [:flush])
    returned(result, state, %{data | task: nil, running: %{}})
  end

  def handle_event(:info, {:DOWN, ref, _, _, reason}, state, %{task: %{ref: ref}} = data) do
    # The native call of a killed worker goes on.
    Native.cancel(data.cancel)
    data = %{data | task: nil, running: %{}}

    if state == :stopping or data.options.source == nil or data.attempt == @attempts do
      name = "the worker of the vectors"
      returned({:error, Failure.final(name, data.attempt, reason)}, state, data)
    else
      Events.notify(data, {:retry, %{work: "vectors", attempt: data.attempt + 1, reason: reason}})
      tally = %{data.tally | tensors_done: 0, bytes_done: 0, bytes_written: 0}
      {:keep_state, work(%{data | tally: tally, vectors: 0})}
    end
  end

  def handle_event(:info, {:DOWN, _ref, :process, pid, _reason}, _state, data) do
    {:keep_state, %{data | subscribers: List.delete(data.subscribers, pid)}}
  end

  # A worker is linked, so that it ends with the job; of its own end its monitor tells.
  def handle_event(:info, {:EXIT, pid, reason}, _state, data) when reason != :normal do
    if pid in data.workers, do: :keep_state_and_data, else: {:stop, reason}
  end

  def handle_event(:state_timeout, :linger, :done, _data), do: {:stop, :normal}

  def handle_event(:state_timeout, :kill, :stopping, data) do
    if data.task, do: Process.exit(data.task.pid, :kill)
    :keep_state_and_data
  end

  # What arrives too late to matter.
  def handle_event(_type, _event, _state, _data), do: :keep_state_and_data

  defp work(data) do
    {job, cancel, attempt} = {self(), Native.cancel_flag(), data.attempt + 1}
    %{options: options, started: started} = data

    task =
      Task.Supervisor.async(Workers, fn ->
        Worker.run(options, %{job: job, cancel: cancel, attempt: attempt, started: started})
      end)

    workers = [task.pid | data.workers]
    %{data | task: task, cancel: cancel, attempt: attempt, workers: workers}
  end

  defp told({:piece, unit}, _state, data) do
    step = Step.new({:unit, unit, [unit.id]}, unit.input_bytes)
    step = %{step | started: System.monotonic_time(), attempt: data.attempt}
    {:keep_state, %{data | running: %{unit.name => step}}}
  end

  defp told({:done, row, how}, _state, data) do
    tally = %{
      data.tally
      | tensors_done: data.tally.tensors_done + 1,
        bytes_done: data.tally.bytes_done + row.input_bytes,
        bytes_written: data.tally.bytes_written + row.output_bytes
    }

    case {how, data.running[row.name]} do
      {:written, step} when step != nil -> Events.unit_done(data, Step.ended(step), row)
      _ -> Events.notify(data, {:unit, row})
    end

    {:keep_state, %{data | tally: tally, running: %{}, vectors: data.vectors + row.vectors}}
  end

  defp told({:redo, row}, _state, data) do
    Events.notify(data, {:redo, %{name: row.name}})
    :keep_state_and_data
  end

  defp told(:finishing, :running, data), do: {:next_state, :finishing, data}
  defp told(:finishing, _state, _data), do: :keep_state_and_data

  defp returned(result, state, data) do
    # A job that is complete is complete, whoever asked for what meanwhile.
    result = if state == :stopping and elem(result, 0) != :ok, do: data.result, else: result
    if data.output, do: Native.output_release(data.output)
    data = %{data | result: result, output: nil, seconds: elapsed(data)}
    Events.ended(data.options, result, System.monotonic_time() - data.started)
    Events.notify(data, {:done, result})
    replies = for from <- data.waiting, do: {:reply, from, result}
    {:next_state, :done, %{data | waiting: []}, replies ++ [linger(), :hibernate]}
  end

  defp stop(data) do
    Native.cancel(data.cancel)
    Events.notify(data, {:state, :stopping})
    data = %{data | result: {:error, cancelled()}}
    {:next_state, :stopping, data, {:state_timeout, @grace_ms, :kill}}
  end

  defp cancelled, do: Error.new(:job, {:cancelled, %{}}, "the job was cancelled")

  defp status(state, data) do
    status = Status.of(state, data, data.seconds || elapsed(data))
    # Of a stream nobody knows how much is left.
    eta = if data.of, do: status.eta_seconds
    Map.merge(status, %{eta_seconds: eta, vectors: %{done: data.vectors, of: data.of}})
  end

  defp linger, do: {:state_timeout, @linger_ms, :linger}
  defp elapsed(data), do: seconds_since(data.started)

  @doc "Seconds since a moment of the monotonic clock."
  @spec seconds_since(integer) :: float
  def seconds_since(then) do
    System.convert_time_unit(System.monotonic_time() - then, :native, :microsecond) / 1.0e6
  end
end
