defmodule VivaTensor.Job.Admission do
  @moduledoc """
  Lets units run while the bytes in flight over all jobs of the node stay within
  the memory limit that each job was given.

  Requests are granted in the order they came, so a large unit is not starved by
  small ones behind it, and jobs that ask for a few units at a time take turns.
  A unit larger than the limit runs alone. What a job holds comes back when the
  job ends, however it ends, and never before the native calls that hold the memory
  have returned: a process that is killed leaves its call running, so the flag of
  each request tells.
  """

  use GenServer

  alias VivaTensor.Native

  @type ticket :: reference

  # Between two looks at a native call that was told to leave.
  @poll_ms 5

  @doc false
  def start_link(_), do: GenServer.start_link(__MODULE__, [], name: __MODULE__)

  @doc """
  Asks for `bytes` under `limit`, for native calls with a cancel flag. The caller
  receives `{:admitted, ticket}` when they are granted.
  """
  @spec request(non_neg_integer, pos_integer, reference) :: ticket
  def request(bytes, limit, flag) do
    ticket = make_ref()
    GenServer.cast(__MODULE__, {:request, ticket, self(), bytes, limit, flag})
    ticket
  end

  @doc """
  Gives back what a ticket holds as soon as no native call has its flag, or withdraws
  its request.
  """
  @spec release(ticket) :: :ok
  def release(ticket), do: GenServer.cast(__MODULE__, {:release, ticket})

  @doc "Bytes in flight over all jobs of the node."
  @spec in_flight() :: non_neg_integer
  def in_flight, do: GenServer.call(__MODULE__, :in_flight)

  @impl true
  def init(_) do
    {:ok, %{in_flight: 0, held: %{}, leaving: [], waiting: :queue.new(), monitors: %{}}}
  end

  @impl true
  def handle_call(:in_flight, _from, state), do: {:reply, state.in_flight, state}

  @impl true
  def handle_cast({:request, ticket, pid, bytes, limit, flag}, state) do
    monitors = Map.put_new_lazy(state.monitors, pid, fn -> Process.monitor(pid) end)
    waiting = :queue.in({ticket, pid, bytes, limit, flag}, state.waiting)
    {:noreply, grant(%{state | waiting: waiting, monitors: monitors})}
  end

  def handle_cast({:release, ticket}, state) do
    {:noreply, give_back(state, fn held, _pid -> held == ticket end)}
  end

  @impl true
  def handle_info({:DOWN, _monitor, :process, pid, _reason}, state) do
    for {_ticket, {^pid, _bytes, flag}} <- state.held, do: Native.cancel(flag)
    state = %{state | monitors: Map.delete(state.monitors, pid)}
    {:noreply, give_back(state, fn _ticket, holder -> holder == pid end)}
  end

  def handle_info(:look, %{leaving: leaving} = state) do
    {:noreply, returned(%{state | leaving: []}, leaving)}
  end

  defp give_back(state, gone?) do
    {back, held} =
      Enum.split_with(state.held, fn {ticket, {pid, _, _}} -> gone?.(ticket, pid) end)

    waiting =
      :queue.filter(fn {ticket, pid, _, _, _} -> not gone?.(ticket, pid) end, state.waiting)

    back = for {_ticket, {_pid, bytes, flag}} <- back, do: {bytes, flag}
    returned(%{state | held: Map.new(held), waiting: waiting}, back)
  end

  # Counts the bytes back whose native calls have returned, and looks again later
  # after the others.
  defp returned(state, back) do
    {gone, leaving} =
      Enum.split_with(back, fn {_bytes, flag} -> Native.cancel_calls(flag) == 0 end)

    if leaving != [] and state.leaving == [], do: Process.send_after(self(), :look, @poll_ms)
    bytes = gone |> Enum.map(&elem(&1, 0)) |> Enum.sum()
    state = %{state | in_flight: state.in_flight - bytes, leaving: leaving ++ state.leaving}
    grant(state)
  end

  defp grant(state) do
    case :queue.peek(state.waiting) do
      {:value, {ticket, pid, bytes, limit, flag}}
      when state.in_flight == 0 or state.in_flight + bytes <= limit ->
        send(pid, {:admitted, ticket})

        grant(%{
          state
          | waiting: :queue.drop(state.waiting),
            held: Map.put(state.held, ticket, {pid, bytes, flag}),
            in_flight: state.in_flight + bytes
        })

      _ ->
        state
    end
  end
end
