defmodule VivaTensor.CLI.Ops do
  @moduledoc """
  The work behind `mix viva.bench ops`: what quantizing, dequantizing and multiplying
  take from Elixir, format by format.
  """

  alias VivaTensor.{CLI, Quantized, Table, Tensor}
  alias VivaTensor.CLI.Quality

  @shape [4096, 4096]
  # What each figure is measured for at least.
  @microseconds 300_000
  # Bytes of weights that no cache holds.
  @past_caches 256 * 1024 * 1024
  @tokens [1, 8, 512]

  @typedoc """
  A format's rates: GB/s of f32 for `quantize` and `dequantize`, GB/s of codes and
  scales for one token, GOP/s for more.
  """
  @type row :: %{
          format: atom,
          bits_per_weight: float,
          quantize: float,
          dequantize: float,
          matmul: %{pos_integer => float}
        }

  @doc """
  Prints the rates of every format on a weight of this shape, each measured for as
  many microseconds.
  """
  @spec run(keyword, [pos_integer], pos_integer) :: CLI.exit_code()
  def run(flags, shape \\ @shape, microseconds \\ @microseconds) do
    rows = rows(shape, microseconds)
    cpu = VivaTensor.cpu()

    if flags[:json] do
      IO.puts(CLI.json(%{shape: shape, cpu: cpu, rows: Enum.map(rows, &to_map/1)}))
    else
      IO.write(to_text(rows, shape, cpu))
    end

    0
  end

  @doc "Measures every format."
  @spec rows([pos_integer], pos_integer) :: [row]
  def rows([n, k] = shape, microseconds) do
    dense = shape |> Quality.draws() |> Tensor.from_binary!(:f32, shape)
    sparse = VivaTensor.sparsify!(dense)
    xs = for m <- @tokens, do: [m, k] |> Quality.draws() |> Tensor.from_binary!(:f32, [m, k])

    for %{name: format} <- VivaTensor.formats() do
      w = if format == :sparse24, do: sparse, else: dense
      q = VivaTensor.quantize!(w, format)
      quantize = fn _turn -> w |> VivaTensor.quantize!(format) |> Quantized.release() end
      dequantize = fn _turn -> VivaTensor.dequantize!(q) end
      floats = 4 * n * k

      row = %{
        format: format,
        bits_per_weight: q.bits_per_weight,
        quantize: rate(floats, quantize, microseconds),
        dequantize: rate(floats, dequantize, microseconds),
        matmul: Map.new(xs, &{hd(&1.shape), matmul(&1, q, microseconds)})
      }

      Quantized.release(q)
      row
    end
  end

  # One token is bound by memory: its weights rotate over copies.
  defp matmul(%{shape: [1, _]} = x, q, microseconds) do
    dump = Quantized.dump!(q)
    count = min(div(@past_caches, q.nbytes) + 1, microseconds)
    copies = for _ <- 1..count, do: dump |> :binary.copy() |> Quantized.load!()
    copies = List.to_tuple(copies)
    call = fn turn -> VivaTensor.matmul!(x, elem(copies, rem(turn, count))) end
    rate(q.nbytes, call, microseconds)
  end

  defp matmul(%{shape: [m, k]} = x, %{shape: [n, k]} = q, microseconds) do
    rate(2 * m * n * k, fn _turn -> VivaTensor.matmul!(x, q) end, microseconds)
  end

  # Billions a second at the median call; the first does not count.
  defp rate(work, call, microseconds) do
    call.(0)
    took = repeat(call, microseconds, 1, []) |> Enum.sort()
    work / Enum.at(took, div(length(took), 2))
  end

  # Nanoseconds of calls that take as long as asked for together.
  defp repeat(_call, left, _turn, took) when left <= 0 and took != [], do: took

  defp repeat(call, left, turn, took) do
    start = System.monotonic_time(:nanosecond)
    call.(turn)
    nanoseconds = max(System.monotonic_time(:nanosecond) - start, 1)
    repeat(call, left - nanoseconds / 1000, turn + 1, [nanoseconds | took])
  end

  defp to_map(row) do
    matmul = for {m, rate} <- row.matmul, into: %{}, do: {"#{m}", rate}
    %{row | format: "#{row.format}", matmul: matmul}
  end

  defp to_text(rows, shape, cpu) do
    columns =
      [{"format", :left}, {"bits/w", :right}, {"quantize", :right}, {"dequantize", :right}] ++
        for m <- @tokens, do: {"m = #{m}", :right}

    rows =
      for row <- rows do
        products = for m <- @tokens, do: row.matmul[m]
        rates = for rate <- [row.quantize, row.dequantize | products], do: decimals(rate, 2)
        [row.format, decimals(row.bits_per_weight, 3) | rates]
      end

    [
      "#{Enum.join(shape, " x ")} through the NIF, #{cpu.isa}, threads: #{cpu.threads}\n",
      "GB/s of f32 for quantize and dequantize; x * transposed w in f32 for m rows of x:\n",
      "GB/s of weights for one, GOP/s for more\n\n",
      Table.text(columns, rows)
    ]
  end

  defp decimals(number, digits), do: :erlang.float_to_binary(number / 1, decimals: digits)
end
