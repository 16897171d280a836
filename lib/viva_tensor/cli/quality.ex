defmodule VivaTensor.CLI.Quality do
  @moduledoc false
  # The work behind `mix viva.bench quality`: every format on normal numbers, beside
  # the bar that it must reach and what its reference program makes of the same.

  alias VivaTensor.{CLI, Native, Quantized, Tensor}
  alias VivaTensor.CLI.Style

  @bars "bench/quality_bars.json"
  @references "bench/results/reference_quality.json"
  @root Path.expand("../../..", __DIR__)
  @external_resource Path.join(@root, @bars)
  @external_resource Path.join(@root, @references)
  @bars_json File.read!(Path.join(@root, @bars))
  @references_json File.read!(Path.join(@root, @references))

  @shape [4096, 4096]
  @seed 1

  # SQNR bars are given to two digits, bits to three. Means of 1024² absolute
  # errors have a standard deviation of 1e-4.
  @db_digits 0.005
  @bits_digits 0.0005
  @mean_error_spread 4.0e-4
  @ggml_count 4096

  @typedoc """
  One row: what was measured of which recipe, the bar, and the figure of the
  reference program, where there is one.
  """
  @type row :: %{
          format: String.t(),
          options: %{String.t() => term},
          measure: :sqnr_db | :mean_error | :ggml_error,
          bits_per_weight: float,
          most_bits_per_weight: float | nil,
          figure: float,
          bar: float,
          reference: float | nil,
          program: String.t() | nil,
          note: String.t() | nil,
          met: boolean
        }

  @doc """
  Prints every row of `bars`, on a tensor of this shape; the exit code says whether
  every bar is reached.
  """
  @spec run(keyword, map, [pos_integer]) :: CLI.exit_code()
  def run(flags, bars \\ bars(), shape \\ @shape) do
    draws = draws(shape)
    rows = rows(bars, draws, shape)
    missed = Enum.count(rows, &(not &1.met))

    if flags[:json] do
      IO.puts(CLI.json(to_map(rows, missed, shape)))
    else
      IO.write(to_text(rows, missed, shape, draws))
    end

    min(missed, 1)
  end

  @doc "Normal f32 numbers, the same in every run: row-major, little-endian."
  @spec draws([pos_integer]) :: binary
  def draws(shape), do: draws(Enum.product(shape), :rand.seed_s(:exsss, @seed), <<>>)

  defp draws(0, _state, drawn), do: drawn

  defp draws(count, state, drawn) do
    {value, state} = :rand.normal_s(state)
    draws(count - 1, state, <<drawn::binary, value::float-32-little>>)
  end

  @doc "The bars, as the file has them."
  @spec bars() :: map
  def bars, do: decode(@bars_json)

  @doc """
  Measures every row of `bars` on `draws` of this shape, which has at least 1024²
  elements.
  """
  @spec rows(map, binary, [pos_integer]) :: [row]
  def rows(bars, draws, shape) do
    references = decode(@references_json)
    tensor = Tensor.from_binary!(draws, :f32, shape)
    # bitsandbytes tests on 1024² numbers, ggml on a cosine.
    square = Tensor.from_binary!(binary_part(draws, 0, 4 * 1024 * 1024), :f32, [1024, 1024])
    cosine = Tensor.from_list!(cosine(), :f32, [@ggml_count])

    sqnr =
      for bar <- bars["sqnr"] do
        bits = bar["bits_per_weight"]

        bar
        |> measure(:sqnr_db, tensor, & &1.sqnr_db, references)
        |> Map.put(:most_bits_per_weight, bits)
        |> met(&(&1.figure >= &1.bar - @db_digits and &1.bits_per_weight <= bits + @bits_digits))
      end

    mean_error =
      for bar <- bars["mean_error"] do
        bar
        |> measure(:mean_error, square, & &1.mean_error, references)
        |> met(&(abs(&1.figure - &1.bar) <= @mean_error_spread))
      end

    ggml_error =
      for bar <- bars["ggml_error"], method <- ["rtn", "mse"] do
        bar
        |> Map.put("ggml_error", bar["error"])
        |> Map.update!("options", &Map.put(&1, "method", method))
        |> measure(:ggml_error, cosine, &:math.sqrt(&1.mse / @ggml_count), references)
        |> met(&(&1.figure < &1.bar))
      end

    sqnr ++ mean_error ++ ggml_error
  end

  defp cosine, do: for(i <- 0..(@ggml_count - 1), do: 0.1 + 2 * :math.cos(i))

  defp measure(bar, measure, tensor, figure, references) do
    %{"format" => format, "options" => options} = bar
    quantized = VivaTensor.quantize!(tensor, String.to_atom(format), keyword(options))
    metrics = VivaTensor.metrics!(tensor, quantized)
    Quantized.release(quantized)
    name = to_string(measure)
    same = &(&1["format"] == format and &1["options"] == options)
    reference = Enum.find(references[name], %{}, same)

    %{
      format: format,
      options: options,
      measure: measure,
      bits_per_weight: metrics.bits_per_weight,
      most_bits_per_weight: nil,
      figure: figure.(metrics),
      bar: Map.fetch!(bar, name),
      reference: reference[name],
      program: reference["program"],
      note: bar["note"]
    }
  end

  defp met(row, met?), do: Map.put(row, :met, met?.(row))

  # Names of a file of our own.
  defp keyword(options) do
    for {key, value} <- options do
      {String.to_atom(key), if(is_binary(value), do: String.to_atom(value), else: value)}
    end
  end

  defp decode(json) do
    {:ok, term} = Native.json_decode(json)
    term
  end

  defp to_map(rows, missed, shape) do
    references = decode(@references_json)
    %{shape: shape, seed: @seed, rows: rows, missed: missed, made_with: references["made_with"]}
  end

  defp to_text(rows, missed, shape, draws) do
    %{sqnr_db: sqnr, mean_error: mean_error, ggml_error: ggml_error} =
      Enum.group_by(rows, & &1.measure)

    references = decode(@references_json)
    programs = for {name, version} <- Enum.sort(references["made_with"]), do: "#{name} #{version}"

    [
      "SQNR in dB on N(0, 1), #{Enum.join(shape, " x ")}\n\n",
      sqnr_table(sqnr),
      "\nMean |error| on N(0, 1), 1024 x 1024; the bar is what bitsandbytes' tests state\n\n",
      error_table(mean_error, 6),
      "\nThe error of ggml's test-quantize-fns; the bar is its bound\n\n",
      error_table(ggml_error, 7),
      "\n#{length(rows)} rows, ",
      if(missed == 0, do: "every bar is reached\n", else: "#{missed} below the bar\n"),
      "Reference figures: #{Enum.join(programs, ", ")}",
      if(sha256(draws) == references["sha256"], do: "", else: ", on other draws"),
      "\n"
    ]
  end

  defp sqnr_table(rows) do
    columns = [
      {"format", :left},
      {"options", :left},
      {"bits/w", :right},
      {"at most", :right},
      {"SQNR dB", :right},
      {"bar", :right},
      {"reference", :right},
      {"by", :left},
      {"", :left}
    ]

    Style.table(
      columns,
      for row <- rows do
        [
          row.format,
          options(row.options),
          decimals(row.bits_per_weight, 4),
          decimals(row.most_bits_per_weight, 3),
          decimals(row.figure, 2),
          decimals(row.bar, 2),
          decimals(row.reference, 2),
          row.program || "-",
          verdict(row)
        ]
      end
    )
  end

  defp error_table(rows, digits) do
    columns = [
      {"format", :left},
      {"options", :left},
      {"error", :right},
      {"bar", :right},
      {"reference", :right},
      {"by", :left},
      {"", :left}
    ]

    Style.table(
      columns,
      for row <- rows do
        [
          row.format,
          options(row.options),
          decimals(row.figure, digits),
          decimals(row.bar, digits),
          decimals(row.reference, digits),
          row.program || "-",
          verdict(row)
        ]
      end
    )
  end

  defp options(options) do
    Enum.map_join(options, ", ", fn
      {key, true} -> key
      {key, value} -> "#{key} #{value}"
    end)
  end

  defp verdict(%{met: false}), do: Style.paint("MISSED", :bad)
  defp verdict(%{note: nil}), do: Style.paint("ok", :good)
  defp verdict(%{note: note}), do: "#{Style.paint("ok", :good)}: #{note}"

  defp sha256(draws), do: :crypto.hash(:sha256, draws) |> Base.encode16(case: :lower)

  defp decimals(nil, _digits), do: "-"
  defp decimals(number, digits), do: :erlang.float_to_binary(number / 1, decimals: digits)
end
