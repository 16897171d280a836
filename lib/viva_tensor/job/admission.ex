defmodule VivaTensor.Job.Admission do
  @moduledoc """
  Lets units run while the bytes in flight over all jobs of the node stay within
  the memory limit that each job was given.

  Requests are granted in the order they came, so a large unit is not starved by
  small ones behind it, and jobs that ask for a few units at a time take turns.
  A unit larger than the limit runs alone. What a job holds comes back when the
  job ends, however it ends.
  """

  use GenServer

  @type ticket :: reference

  @doc false
  def start_link(_), do: GenServer.start_link(__MODULE__, [], name: __MODULE__)

  @doc """
  Asks for `bytes` under `limit`. The caller receives `{:admitted, ticket}` when
  they are granted.
  """
  @spec request(non_neg_integer, pos_integer) :: ticket
  def request(bytes, limit) do
    ticket = make_ref()
    GenServer.cast(__MODULE__, {:request, ticket, self(), bytes, limit})
    ticket
  end

  @doc "Gives back what a ticket holds, or withdraws its request."
  @spec release(ticket) :: :ok
  def release(ticket), do: GenServer.cast(__MODULE__, {:release, ticket})

  @doc "Bytes in flight over all jobs of the node."
  @spec in_flight() :: non_neg_integer
  def in_flight, do: GenServer.call(__MODULE__, :in_flight)

  @impl true
  def init(_), do: {:ok, %{in_flight: 0, held: %{}, waiting: :queue.new(), monitors: %{}}}

  @impl true
  def handle_call(:in_flight, _from, state), do: {:reply, state.in_flight, state}

  @impl true
  def handle_cast({:request, ticket, pid, bytes, limit}, state) do
    monitors = Map.put_new_lazy(state.monitors, pid, fn -> Process.monitor(pid) end)
    waiting = :queue.in({ticket, pid, bytes, limit}, state.waiting)
    {:noreply, grant(%{state | waiting: waiting, monitors: monitors})}
  end

  def handle_cast({:release, ticket}, state) do
    {:noreply, state |> give_back(fn held, _pid -> held == ticket end) |> grant()}
  end

  @impl true
  def handle_info({:DOWN, _monitor, :process, pid, _reason}, state) do
    state = %{state | monitors: Map.delete(state.monitors, pid)}
    {:noreply, state |> give_back(fn _ticket, holder -> holder == pid end) |> grant()}
  end

  defp give_back(state, gone?) do
    held = Map.reject(state.held, fn {ticket, {pid, _bytes}} -> gone?.(ticket, pid) end)
    waiting = :queue.filter(fn {ticket, pid, _, _} -> not gone?.(ticket, pid) end, state.waiting)
    in_flight = held |> Map.values() |> Enum.map(&elem(&1, 1)) |> Enum.sum()
    %{state | held: held, waiting: waiting, in_flight: in_flight}
  end

  defp grant(state) do
    case :queue.peek(state.waiting) do
      {:value, {ticket, pid, bytes, limit}}
      when state.in_flight == 0 or state.in_flight + bytes <= limit ->
        send(pid, {:admitted, ticket})

        grant(%{
          state
          | waiting: :queue.drop(state.waiting),
            held: Map.put(state.held, ticket, {pid, bytes}),
            in_flight: state.in_flight + bytes
        })

      _ ->
        state
    end
  end
end
