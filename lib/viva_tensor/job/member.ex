defmodule VivaTensor.Job.Member do
  @moduledoc false
  # What works for a job on another node.
  #
  # It opens the source by its path and makes the same plan, so that a unit is sent as a
  # few words and never as a tensor. It is refused where the source or the output is not
  # what the job sees under that path: the storage has to be shared.
  #
  # A unit runs here as it does in its job: admitted by this node's admission, in a worker
  # of its own, with a cancel flag of its own. What it wrote is synced before it is told,
  # since no other machine can sync it. The same messages come to the job as from a worker
  # of its own node, behind the reference under which it sent the step.
  #
  # A member ends with its job, or when it is cut off from it. The job gives its units to
  # others then; what is still written here are the same bytes to the same places, and
  # only ever to the files that the job made: see `VivaTensor.Job.Shard.open/3`.

  use GenServer, restart: :temporary

  alias VivaTensor.{Error, Native}
  alias VivaTensor.Job.{Admission, Identity, Observation, Options, Resumption, Shard, Step}
  alias VivaTensor.Job.{Tally, Worker}

  defstruct [:job, :options, :plan, :output, tally: %Tally{}, requested: %{}, running: %{}] ++
              [found: %Resumption{}]

  @typedoc """
  The job, its options, what it is known by, where its output is filled, and the scales
  that it chose.
  """
  @type invitation :: %{
          job: pid,
          options: keyword,
          identity: Identity.t(),
          output: Path.t(),
          scales: %{Observation.group() => Observation.chosen()}
        }

  @doc "Starts a member on this node: its process, and how many units it does at once."
  @spec join(invitation) :: {:ok, pid, pos_integer} | {:error, Error.t()}
  def join(invitation) do
    with {:ok, _} <- Application.ensure_all_started(:viva_tensor),
         {:ok, pid} <-
           DynamicSupervisor.start_child(VivaTensor.Job.Supervisor, {__MODULE__, invitation.job}) do
      case GenServer.call(pid, {:prepare, invitation}, :infinity) do
        {:ok, workers} -> {:ok, pid, workers}
        {:error, error} -> {:error, error}
      end
    end
  end

  @doc false
  def start_link(job), do: GenServer.start_link(__MODULE__, job)

  @impl true
  def init(job) do
    Process.monitor(job)
    {:ok, %__MODULE__{job: job}}
  end

  @impl true
  def handle_call({:prepare, invitation}, _from, state) do
    case prepare(invitation) do
      {:ok, options, plan} ->
        shards = for {units, n} <- Enum.with_index(plan.shards), do: Shard.new([n], units)

        state = %{
          state
          | options: options,
            plan: plan,
            tally: Tally.new(shards),
            output: invitation.output
        }

        {:reply, {:ok, Options.workers(options)}, state}

      {:error, error} ->
        {:stop, :normal, {:error, error}, state}
    end
  end

  @impl true
  def handle_info({:do, ref, step, mark}, state) do
    step = Step.armed(%{step | node: nil, pid: nil})
    %{memory_limit: limit, priority: priority} = state.options
    ticket = Admission.request(step.bytes, limit, step.cancel, priority)
    tally = Tally.update(state.tally, elem(step.work, 2), &%{&1 | mark: mark})
    requested = Map.put(state.requested, ticket, {ref, step})
    {:noreply, %{state | tally: tally, requested: requested}}
  end

  def handle_info({:admitted, ticket}, state) do
    case Map.pop(state.requested, ticket) do
      # Cancelled in between: it was given back then.
      {nil, _} ->
        {:noreply, state}

      {{ref, step}, requested} ->
        start(ref, %{step | ticket: ticket}, %{state | requested: requested})
    end
  end

  def handle_info({task, result}, state) when is_map_key(state.running, task) do
    Process.demonitor(task, [:flush])
    {ref, state} = returned(task, state)
    send(state.job, {ref, result})
    {:noreply, state}
  end

  def handle_info({:DOWN, task, :process, pid, reason}, state)
      when is_map_key(state.running, task) do
    {_ref, step} = state.running[task]
    # The native call of a killed worker goes on.
    Native.cancel(step.cancel)
    {ref, state} = returned(task, state)
    send(state.job, {:DOWN, ref, :process, pid, reason})
    {:noreply, state}
  end

  def handle_info({:DOWN, _ref, :process, job, _reason}, %{job: job} = state) do
    {:stop, :normal, state}
  end

  def handle_info({:cancel, ref}, state) do
    for {_task, {^ref, step}} <- state.running, do: Native.cancel(step.cancel)

    {waiting, requested} = Enum.split_with(state.requested, &match?({_, {^ref, _}}, &1))

    for {ticket, _} <- waiting do
      Admission.release(ticket)
      error = Error.new(:unit, {:cancelled, %{}}, "it was cancelled before it began")
      send(state.job, {ref, {:error, error}})
    end

    {:noreply, %{state | requested: Map.new(requested)}}
  end

  def handle_info(:dismiss, state), do: {:stop, :normal, state}
  def handle_info(_message, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, state) do
    # What they hold comes back when their native calls have returned.
    for {_, {_ref, step}} <- Enum.concat(state.requested, state.running),
        do: Native.cancel(step.cancel)
  end

  defp start(ref, step, state) do
    state = make_room(elem(step.work, 2), state)

    case Worker.prepare(step, state) do
      {:ok, fun, tally} ->
        state = %{state | tally: tally}
        {task, step} = Step.begin(step, synced(fun, step, state), :infinity, %{})
        send(state.job, {:began, ref, step.pid})
        {:noreply, %{state | running: Map.put(state.running, task, {ref, step})}}

      {:error, error} ->
        Admission.release(step.ticket)
        send(state.job, {ref, {:error, error}})
        {:noreply, state}
    end
  end

  # Nobody tells a member that a shard is finished: the files of those that it does
  # nothing for are closed before it opens another.
  defp make_room(id, %{tally: tally} = state) do
    if tally.shards[id].ref do
      state
    else
      steps = Map.values(state.requested) ++ Map.values(state.running)
      used = for {_ref, step} <- steps, do: elem(step.work, 2)
      unused = for {id, %{ref: ref}} <- tally.shards, ref != nil, id not in used, do: id
      closed = &Tally.update(&2, &1, fn shard -> %{shard | ref: nil} end)
      %{state | tally: Enum.reduce(unused, tally, closed)}
    end
  end

  defp returned(task, state) do
    {{ref, step}, running} = Map.pop!(state.running, task)
    Admission.release(step.ticket)
    {ref, %{state | running: running}}
  end

  defp synced(fun, %{work: {:unit, _unit, id}}, state) do
    shard = state.tally.shards[id].ref

    fn ->
      with {:ok, done} <- fun.(),
           {:ok, _} <- shard |> Native.shard_sync() |> Error.wrap(:output),
           do: {:ok, done}
    end
  end

  defp synced(fun, _recall, _state), do: fun

  defp prepare(%{options: options, identity: identity} = invitation) do
    with {:ok, options} <- Options.new(options),
         {:ok, {plan, here}} <- Identity.plan(options),
         :ok <- Identity.same_work(identity, here),
         :ok <- shared(invitation.output),
         :ok <- use_scales(plan, invitation.scales),
         do: {:ok, options, plan}
  end

  defp shared(output) do
    if File.dir?(output) do
      :ok
    else
      {:error,
       Error.new(
         :output,
         {:io, %{path: output, code: "enoent"}},
         "#{node()} does not see #{output}: the nodes of a job share their storage"
       )}
    end
  end

  defp use_scales(%{work: {:quantize, _spec, observed}} = plan, scales) do
    Enum.reduce_while(scales, :ok, fn {group, chosen}, :ok ->
      case Observation.use_scales(observed, plan.checkpoint.ref, group, chosen.scales) do
        {:ok, _notes} -> {:cont, :ok}
        error -> {:halt, error}
      end
    end)
  end

  defp use_scales(_plan, _scales), do: :ok
end
