# What a second thread brings, and whether cost grows with size:
#
#     mix run bench/scaling.exs [--gigabytes 4] [--repeats 5]
#
# Compute-bound work with 1, 2, 4 … threads, in turn; and quantize, dequantize and a
# product of one token on weights of 1 MB up to so many gigabytes of f32, in ns an
# element, which stays the same once all threads are busy and no cache helps. Figures
# are the least of the repeats. CPU seconds grow where threads wait for each other or
# do work twice; where the machine does other things too, they say more than wall.

Code.require_file("../test/support/os_process.ex", __DIR__)

defmodule Scaling do
  alias VivaTensor.{CLI, Quantized, Table, Tensor}
  alias VivaTensor.Test.OSProcess

  @side 4096
  @columns 4096

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
        {{name, count}, timed(work)}
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
    {Enum.min(walls), max(Enum.min(cpus), 0.01)}
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
          for work <- works do
            took = for _ <- 1..repeats, do: timed(work) |> elem(0)
            Enum.min(took) * 1.0e9 / Enum.product(shape)
          end

        Tensor.release(w)
        Quantized.release(q)
        :erlang.garbage_collect()
        [VivaTensor.Size.format(4 * Enum.product(shape)) | decimals(figures, 3)]
      end

    columns =
      for title <- ["f32", "quantize int8", "dequantize to bf16", "m = 1, f32"],
          do: {title, :right}

    IO.puts("ns an element, #{VivaTensor.cpu().threads} threads")
    IO.puts([Table.text(columns, rows)])
  end

  defp draws(shape), do: shape |> CLI.Quality.draws() |> Tensor.from_binary!(:f32, shape)

  # Seconds: of the wall, and of all cores.
  defp timed(work) do
    cpu = OSProcess.cpu_seconds()
    {wall, _} = :timer.tc(work)
    {wall / 1.0e6, OSProcess.cpu_seconds() - cpu}
  end

  defp decimals(figures, digits) do
    for figure <- figures, do: :erlang.float_to_binary(figure / 1, decimals: digits)
  end
end

Scaling.run(System.argv())
