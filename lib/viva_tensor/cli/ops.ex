defmodule VivaTensor.CLI.Ops do
  @moduledoc false
  # The work behind `mix viva.bench ops`: what quantizing, dequantizing and multiplying
  # take from Elixir, format by format.

  alias VivaTensor.{CLI, Packed, Quantized, Tensor}
  alias VivaTensor.CLI.{Quality, Style}

  @shape [4096, 4096]
  # What each figure is measured for at least.
  @microseconds 300_000
  # Bytes of weights that no cache holds.
  @past_caches 256 * 1024 * 1024
  @tokens [1, 8, 512]

  @typedoc """
  A format's rates: GB/s of f32 for `quantize` and `dequantize`, GB/s of codes and
  scales for one token, GOP/s for more. `matmul` is in f32, `packed` in int8 with
  weights that are packed before, nil for a format that has no such product.
  """
  @type row :: %{
          format: atom,
          bits_per_weight: float,
          quantize: float,
          dequantize: float,
          matmul: %{pos_integer => float},
          packed: %{pos_integer => float} | nil
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
        matmul: products(xs, q, loader(q), microseconds),
        packed: packed(xs, q, microseconds)
      }

      Quantized.release(q)
      row
    end
  end

  defp packed(xs, q, microseconds) do
    case VivaTensor.prepack(q) do
      {:ok, packed} ->
        Packed.release(packed)
        products(xs, q, fn -> VivaTensor.prepack!(q) end, microseconds)

      {:error, _} ->
        nil
    end
  end

  # Makes a copy of the weights at each call.
  defp loader(q) do
    dump = Quantized.dump!(q)
    fn -> dump |> :binary.copy() |> Quantized.load!() end
  end

  defp products(xs, q, copy, microseconds) do
    for x <- xs, into: %{}, do: {hd(x.shape), matmul(x, q, copy, microseconds)}
  end

  # One token is bound by memory: its weights rotate over copies.
  defp matmul(%{shape: [1, _]} = x, q, copy, microseconds) do
    count = min(div(@past_caches, q.nbytes) + 1, microseconds)
    copies = List.to_tuple(for _ <- 1..count, do: copy.())
    call = fn turn -> VivaTensor.matmul!(x, elem(copies, rem(turn, count))) end
    rate = rate(q.nbytes, call, microseconds)
    # Not when they are collected: the next format's come on top.
    for %kind{} = weights <- Tuple.to_list(copies), do: kind.release(weights)
    rate
  end

  defp matmul(%{shape: [m, k]} = x, %{shape: [n, k]}, copy, microseconds) do
    weights = copy.()
    rate(2 * m * n * k, fn _turn -> VivaTensor.matmul!(x, weights) end, microseconds)
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
    %{row | format: "#{row.format}", matmul: by_text(row.matmul), packed: by_text(row.packed)}
  end

  defp by_text(nil), do: nil
  defp by_text(rates), do: for({m, rate} <- rates, into: %{}, do: {"#{m}", rate})

  defp to_text(rows, shape, cpu) do
    products = for compute <- ["f32", "int8"], m <- @tokens, do: {"#{compute} m = #{m}", :right}

    columns =
      [{"format", :left}, {"bits/w", :right}, {"quantize", :right}, {"dequantize", :right}] ++
        products

    rows =
      for row <- rows do
        products = for rates <- [row.matmul, row.packed], m <- @tokens, do: rates && rates[m]
        rates = for rate <- [row.quantize, row.dequantize | products], do: decimals(rate, 2)
        [row.format, decimals(row.bits_per_weight, 3) | rates]
      end

    [
      "#{Enum.join(shape, " x ")} through the NIF, #{cpu.isa}, threads: #{cpu.threads}\n",
      "GB/s of f32 for quantize and dequantize; x * transposed w for m rows of x, in f32,\n",
      "and in int8 with packed weights: GB/s of weights for one, GOP/s for more\n\n",
      Style.table(columns, rows)
    ]
  end

  defp decimals(nil, _digits), do: nil
  defp decimals(number, digits), do: :erlang.float_to_binary(number / 1, decimals: digits)
end
