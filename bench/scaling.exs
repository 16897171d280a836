# What a second thread brings, and whether cost grows with size:
#
#     mix run bench/scaling.exs [--gigabytes 4] [--repeats 5]
#
# Compute-bound work with 1, 2, 4 … threads, in turn; and quantize, dequantize and a
# product of one token on weights of 1 MB up to so many gigabytes of f32, in ns an
# element, which stays the same once all threads are busy and no cache helps.
#
# Wall is that of the least call, CPU that of all calls together, over all cores. CPU
# grows where threads do work twice or wait for memory; where the machine does other
# things too, it says more than wall does.

Code.require_file("../test/support/os_process.ex", __DIR__)

defmodule Scaling do
  alias VivaTensor.{CLI, Quantized, Table, Tensor}
  alias VivaTensor.Test.OSProcess

  @side 4096
  @columns 4096
  # What each figure is measured for at least; /proc counts hundredths of a second.
  @seconds 0.3

  def run(argv) do
    {options, [], []} = OptionParser.parse(argv, strict: [gigabytes: :integer, repeats: :integer])

    repeats = Keyword.get(options, :repeats, 5)
    bytes = Keyword.get(options, :gigabytes, 4) * 1_000_000_000
    threads(repeats)
    sizes(bytes, repeats)
  end

  # Threads

  defp threads(repeats) do
    counts =
      1 |> Stream.iterate(&(&1 * 2)) |> Enum.take_while(&(&1 <= System.schedulers_online()))

    works = works()

    took =
      for _ <- 1..repeats, {name, work} <- works, count <- counts do
        {:ok, _} = VivaTensor.Application.configure_threads(count)
        {{name, count}, timed(work, 1)}
      end

    rows =
      for {name, _} <- works, count <- counts do
        {wall, cpu} = least(took, {name, count})
        {wall_of_one, cpu_of_one} = least(took, {name, 1})
        [name, count] ++ decimals([wall * 1000, wall_of_one / wall, cpu / cpu_of_one], 2)
      end

    columns = [
      {"#{@side} x #{@side}", :left},
      {"threads", :right},
      {"wall ms", :right},
      {"one / wall", :right},
      {"CPU / one's", :right}
    ]

    IO.puts([Table.text(columns, rows)])
  end

  defp works do
    w = draws([@side, @side])
    x = draws([512, @side])
    int4 = VivaTensor.quantize!(w, :int4)
    packed = VivaTensor.prepack!(int4)

    [
      {"m = 512, int4 packed, int8", fn -> VivaTensor.matmul!(x, packed) end},
      {"m = 512, int4, f32", fn -> VivaTensor.matmul!(x, int4) end},
      {"quantize q4_k", fn -> w |> VivaTensor.quantize!(:q4_k) |> Quantized.release() end}
    ]
  end

  defp least(took, key) do
    walls = for {^key, {wall, _}} <- took, do: wall
    cpus = for {^key, {_, cpu}} <- took, do: cpu
    {Enum.min(walls), Enum.min(cpus)}
  end

  # Sizes

  defp sizes(bytes, repeats) do
    {:ok, _} = VivaTensor.Application.configure_threads(System.schedulers_online())
    sizes = 1_000_000 |> Stream.iterate(&(&1 * 4)) |> Enum.take_while(&(&1 < bytes))
    piece = CLI.Quality.draws([64, @columns])
    x = draws([1, @columns])

    rows =
      for size <- sizes ++ [bytes] do
        copies = max(div(size, byte_size(piece)), 1)
        shape = [64 * copies, @columns]
        w = piece |> :binary.copy(copies) |> Tensor.from_binary!(:f32, shape)
        q = VivaTensor.quantize!(w, :int8)

        works = [
          fn -> w |> VivaTensor.quantize!(:int8) |> Quantized.release() end,
          fn -> q |> VivaTensor.dequantize!(dtype: :bf16) |> Tensor.release() end,
          fn -> VivaTensor.matmul!(x, q) end
        ]

        figures =
          for work <- works, seconds <- Tuple.to_list(timed(work, repeats)) do
            seconds * 1.0e9 / Enum.product(shape)
          end

        Tensor.release(w)
        Quantized.release(q)
        :erlang.garbage_collect()
        [VivaTensor.Size.format(4 * Enum.product(shape)) | decimals(figures, 3)]
      end

    columns =
      for title <- ["quantize int8", "dequantize to bf16", "m = 1, f32"],
          clock <- ["wall", "CPU"],
          do: {"#{title}: #{clock}", :right}

    IO.puts("ns an element, #{VivaTensor.cpu().threads} threads")
    IO.puts([Table.text([{"f32", :right} | columns], rows)])
  end

  defp draws(shape), do: shape |> CLI.Quality.draws() |> Tensor.from_binary!(:f32, shape)

  # Seconds of a call: of the wall, and of all cores.
  defp timed(work, repeats) do
    cpu = OSProcess.cpu_seconds()
    walls = calls(work, repeats, @seconds, [])
    {Enum.min(walls), (OSProcess.cpu_seconds() - cpu) / length(walls)}
  end

  defp calls(_work, repeats, left, walls) when repeats <= 0 and left <= 0, do: walls

  defp calls(work, repeats, left, walls) do
    {microseconds, _} = :timer.tc(work)
    wall = microseconds / 1.0e6
    calls(work, repeats - 1, left - wall, [wall | walls])
  end

  defp decimals(figures, digits) do
    for figure <- figures, do: :erlang.float_to_binary(figure / 1, decimals: digits)
  end
end

Scaling.run(System.argv())
