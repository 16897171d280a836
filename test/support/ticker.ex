defmodule VivaTensor.Test.Ticker do
  @moduledoc """
  A normal process that wakes up every millisecond, and how late it ever was.
  """

  @doc "Runs `work` beside it: the result, and microseconds by which the latest tick was late."
  def beside(work) do
    ticker = spawn_link(fn -> tick(System.monotonic_time(:microsecond), 0) end)
    result = work.()
    send(ticker, {:stop, self()})
    {result, receive(do: ({:latest, latest} -> latest))}
  end

  defp tick(previous, latest) do
    receive do
      {:stop, to} -> send(to, {:latest, latest})
    after
      1 ->
        now = System.monotonic_time(:microsecond)
        tick(now, max(latest, now - previous - 1000))
    end
  end
end
