defmodule VivaTensor.Job.Admission do
  @moduledoc false
  # Lets units run while the bytes in flight over all jobs of the node stay within
  # the memory limit that each job was given.
  #
  # Of the jobs that wait, those of the highest priority come first, and among these the
  # one that was granted the fewest bytes since they all wait: jobs of the same priority
  # share the memory, however large their units are and however many they ask for. The
  # requests of one job are granted in the order they came. What comes next is waited
  # for, so a large unit is not starved by small ones behind it; one that is larger than
  # the limit runs alone.
  #
  # What a job holds comes back when the job ends, however it ends, and never before the
  # native calls that hold the memory have returned: a process that is killed leaves its
  # call running, so the flag of each request tells.

  use GenServer

  alias VivaTensor.Native

  @type ticket :: reference

  @ranks %{high: 0, normal: 1, low: 2}
  # Between two looks at a native call that was told to leave.
  @poll_ms 5

  @doc false
  def start_link(_), do: GenServer.start_link(__MODULE__, [], name: __MODULE__)

  @doc """
  Asks for `bytes` under `limit`, for native calls with a cancel flag. The caller
  receives `{:admitted, ticket}` when they are granted.
  """
  @spec request(non_neg_integer, pos_integer, reference, :low | :normal | :high) :: ticket
  def request(bytes, limit, flag, priority \\ :normal) do
    ticket = make_ref()
    GenServer.cast(__MODULE__, {:request, self(), priority, {ticket, bytes, limit, flag}})
    ticket
  end

  @doc """
  Gives back what a ticket holds as soon as no native call has its flag, or withdraws
  its request: the caller's own.
  """
  @spec release(ticket) :: :ok
  def release(ticket), do: GenServer.cast(__MODULE__, {:release, self(), ticket})

  @doc "Bytes in flight over all jobs of the node."
  @spec in_flight() :: non_neg_integer
  def in_flight, do: GenServer.call(__MODULE__, :in_flight)

  # `jobs` are by pid, each with what it waits for and what it was granted; `held` is by
  # ticket; `leaving` was given back while a native call went on.
  @impl true
  def init(_), do: {:ok, %{in_flight: 0, granted: 0, jobs: %{}, held: %{}, leaving: []}}

  @impl true
  def handle_call(:in_flight, _from, state), do: {:reply, state.in_flight, state}

  @impl true
  def handle_cast({:request, pid, priority, request}, state) do
    job =
      Map.get_lazy(state.jobs, pid, fn ->
        Process.monitor(pid)
        %{priority: priority, granted: 0, waiting: :queue.new()}
      end)

    # A job that waited for nothing has no claim for that time.
    granted =
      if :queue.is_empty(job.waiting), do: max(job.granted, state.granted), else: job.granted

    job = %{job | granted: granted, waiting: :queue.in(request, job.waiting)}
    {:noreply, grant(put_in(state.jobs[pid], job))}
  end

  def handle_cast({:release, pid, ticket}, state) do
    case {Map.pop(state.held, ticket), state.jobs[pid]} do
      {{{_pid, bytes, flag}, held}, _} ->
        {:noreply, give_back(%{state | held: held}, [{bytes, flag}])}

      {{nil, _}, %{waiting: waiting} = job} ->
        waiting = :queue.filter(&(elem(&1, 0) != ticket), waiting)
        {:noreply, grant(put_in(state.jobs[pid], %{job | waiting: waiting}))}

      _ ->
        {:noreply, state}
    end
  end

  @impl true
  def handle_info({:DOWN, _monitor, :process, pid, _reason}, state) do
    {back, held} = Enum.split_with(state.held, fn {_, {holder, _, _}} -> holder == pid end)
    back = for {_ticket, {_pid, bytes, flag}} <- back, do: {bytes, flag}
    for {_bytes, flag} <- back, do: Native.cancel(flag)
    state = %{state | held: Map.new(held), jobs: Map.delete(state.jobs, pid)}
    {:noreply, give_back(state, back)}
  end

  def handle_info(:look, %{leaving: leaving} = state) do
    {:noreply, give_back(%{state | leaving: []}, leaving)}
  end

  # Counts the bytes back whose native calls have returned, and looks again later
  # after the others.
  defp give_back(state, back) do
    {gone, leaving} = Enum.split_with(back, fn {_, flag} -> Native.cancel_calls(flag) == 0 end)
    if leaving != [] and state.leaving == [], do: Process.send_after(self(), :look, @poll_ms)
    bytes = gone |> Enum.map(&elem(&1, 0)) |> Enum.sum()
    grant(%{state | in_flight: state.in_flight - bytes, leaving: leaving ++ state.leaving})
  end

  defp grant(state) do
    with {pid, job} <- next(state.jobs),
         {{:value, {ticket, bytes, limit, flag}}, waiting} = :queue.out(job.waiting),
         true <- state.in_flight == 0 or state.in_flight + bytes <= limit do
      send(pid, {:admitted, ticket})
      jobs = Map.put(state.jobs, pid, %{job | waiting: waiting, granted: job.granted + bytes})
      held = Map.put(state.held, ticket, {pid, bytes, flag})
      in_flight = state.in_flight + bytes
      grant(%{state | jobs: jobs, held: held, in_flight: in_flight, granted: job.granted})
    else
      _ -> state
    end
  end

  defp next(jobs) do
    jobs
    |> Enum.reject(fn {_pid, job} -> :queue.is_empty(job.waiting) end)
    |> Enum.min_by(fn {_pid, job} -> {@ranks[job.priority], job.granted} end, fn -> nil end)
  end
end
