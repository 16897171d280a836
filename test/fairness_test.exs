defmodule VivaTensor.FairnessTest do
  # A thousand callers take the machine.
  use ExUnit.Case, async: false

  alias VivaTensor.Tensor
  alias VivaTensor.Test.{OSProcess, Ticker}

  @callers 1000
  # Some ms late is what it is. Other programs may hold a tick up now and then: what
  # starves processes does so in each round.
  @rounds 10
  @latest_ms 250

  defp draws(shape) do
    shape |> VivaTensor.CLI.Quality.draws() |> Tensor.from_binary!(:f32, shape)
  end

  # Every kind of product: in the calling process or on the pool, by its size.
  defp products do
    for {n, k} <- [{64, 256}, {512, 512}], m <- [1, 9], compute <- [:f32, :int8] do
      weight = VivaTensor.quantize!(draws([n, k]), :int4)
      weight = if compute == :int8, do: VivaTensor.prepack!(weight), else: weight
      x = draws([m, k])
      call = fn -> x |> VivaTensor.matmul!(weight, compute: compute) |> Tensor.to_binary!() end
      {call, call.()}
    end
  end

  test "a thousand processes multiply at once, and others still run" do
    products = products()
    threads = OSProcess.status("Threads")
    rounds = Stream.repeatedly(fn -> multiply_at_once(products, threads) / 1000 end)
    in_time = rounds |> Stream.take(@rounds) |> Enum.any?(&(&1 < @latest_ms))
    assert in_time, "a tick was late in each of #{@rounds} rounds"
  end

  # Microseconds by which the latest tick was late.
  defp multiply_at_once(products, threads) do
    {{right, most}, latest} =
      Ticker.beside(fn ->
        callers =
          for i <- 1..@callers do
            {call, expected} = Enum.at(products, rem(i, length(products)))
            Task.async(fn -> call.() == expected end)
          end

        most = OSProcess.status("Threads")
        {callers |> Task.await_many(:infinity) |> Enum.count(& &1), most}
      end)

    assert right == @callers
    # The pool and the schedulers were there before.
    assert most <= threads
    latest
  end
end
