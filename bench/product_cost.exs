# What a product of one token costs from Elixir over its kernel:
#
#     mix run bench/product_cost.exs [--side 256] [--repeats 20]
#
# The kernel is timed by native/viva_core/examples/ops, which calls the core as the
# NIF does, without the BEAM. Both answer in turn; figures are medians of the repeats,
# each the median of its calls (of batches of 50 from Elixir).

defmodule ProductCost do
  alias VivaTensor.{CLI, Native, Table, Tensor}

  @program "target/release/examples/ops"
  @seconds 0.02
  @batch 50

  def run(argv) do
    {options, [], []} = OptionParser.parse(argv, strict: [side: :integer, repeats: :integer])
    side = Keyword.get(options, :side, 256)
    cargo = ~w(build --release --locked -p viva_core --example ops)
    {_, 0} = System.cmd("cargo", cargo, into: IO.stream())
    directory = Path.join(System.tmp_dir!(), "viva_tensor_cost_#{System.pid()}")
    File.mkdir_p!(directory)

    try do
      rows = measure(side, Keyword.get(options, :repeats, 20), directory)
      columns = for title <- ["kernel", "call", "over"], do: {"#{title} us", :right}
      IO.puts("one token, #{side} x #{side}, #{VivaTensor.cpu().isa}")
      IO.write(Table.text([{"weights, arithmetic", :left} | columns], rows))
    after
      File.rm_rf!(directory)
    end
  end

  defp measure(side, repeats, directory) do
    {w, x} = {CLI.Quality.draws([side, side]), CLI.Quality.draws([1, side])}
    kernels = open(side, w, x, directory)
    w = Tensor.from_binary!(w, :f32, [side, side])
    x = Tensor.from_binary!(x, :f32, [1, side])

    for {format, compute} <- [int4: :int8, nf4: :int8, q4_0: :int8, int8: :int8, int4: :f32] do
      q = VivaTensor.quantize!(w, format)
      packed? = compute == :int8
      weights = if packed?, do: VivaTensor.prepack!(q), else: q

      request = %{
        op: "matmul",
        format: format,
        compute: compute,
        packed: packed?,
        dtype: "f32",
        rows: side,
        m: 1,
        copies: 1,
        budget: @seconds
      }

      took =
        for _ <- 1..repeats do
          {ask(kernels, request), call(fn -> VivaTensor.matmul!(x, weights) end)}
        end

      {kernel, call} = Enum.unzip(took)
      {kernel, call} = {median(kernel), median(call)}
      figures = for us <- [kernel, call, call - kernel], do: Float.round(us, 2)
      ["#{format}, #{compute}#{if packed?, do: " packed"}" | figures]
    end
  end

  # The program, with its weight and activations in files.
  defp open(side, w, x, directory) do
    files =
      for {name, values} <- [{"weight", w}, {"activations", x}] do
        path = Path.join(directory, name)
        File.write!(path, values)
        path
      end

    args = ["1", "#{side}" | files]
    Port.open({:spawn_executable, @program}, [:binary, {:line, 10_000}, args: args])
  end

  # Microseconds of the kernel.
  defp ask(kernels, request) do
    {:ok, json} = Native.json_encode(request, false)
    Port.command(kernels, [json, ?\n])

    receive do
      {^kernels, {:data, {:eol, line}}} ->
        {:ok, %{"seconds" => seconds}} = Native.json_decode(line)
        seconds * 1.0e6
    end
  end

  # Microseconds of the median call.
  defp call(work) do
    stop = System.monotonic_time(:microsecond) + round(@seconds * 1.0e6)
    median(batches(work, stop, []))
  end

  defp batches(work, stop, took) do
    start = System.monotonic_time(:nanosecond)
    for _ <- 1..@batch, do: work.()
    now = System.monotonic_time(:nanosecond)
    took = [(now - start) / 1000 / @batch | took]
    if div(now, 1000) < stop, do: batches(work, stop, took), else: took
  end

  defp median(figures), do: figures |> Enum.sort() |> Enum.at(div(length(figures), 2))
end

ProductCost.run(System.argv())
