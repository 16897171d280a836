# The weights that sparsity.py measures; it calls this and reads what it writes:
#
#     mix run bench/methods/sparsity.exs MODEL_DIR SEEN HELD_OUT OUT
#
# SEEN and HELD_OUT are saved calibrations: what the methods look at, and activations on
# which the error of each layer's output is measured. OUT/index.tsv has a line for every
# way: its number, what chose the zeros, format, how it was rounded, bits per weight and
# the mean error. OUT/NUMBER/NAME holds the f32 values of a weight, row after row.

defmodule Sparsity do
  alias VivaTensor.{Calibration, Checkpoint, Tensor}

  @kinds [:magnitude, :wanda, :sparsegpt]

  def run([model, seen, held, out]) do
    checkpoint = Checkpoint.open!(model)
    {seen, held} = {Calibration.load!(seen), Calibration.load!(held)}
    layers = Enum.map(Calibration.layers(seen), & &1.name)

    index =
      for {{kind, format, how, make}, number} <- Enum.with_index(ways()) do
        directory = Path.join(out, "#{number}")
        File.mkdir_p!(directory)

        measures =
          for layer <- layers do
            weight = Checkpoint.get!(checkpoint, layer <> ".weight")
            q = make.(weight, activations: seen, layer: layer)
            back = VivaTensor.dequantize!(q, dtype: :f32)
            File.write!(Path.join(directory, layer <> ".weight"), Tensor.to_binary!(back))
            metrics = VivaTensor.metrics!(weight, q, activations: held, layer: layer)
            {metrics.output_error, q.nbytes, Enum.product(weight.shape)}
          end

        {errors, bytes, elements} = unzip(measures)
        bits = 8 * Enum.sum(bytes) / Enum.sum(elements)
        error = Enum.sum(errors) / length(errors)
        Enum.join([number, kind, format, how, bits, error], "\t") <> "\n"
      end

    File.write!(Path.join(out, "index.tsv"), index)
  end

  defp ways do
    dense = [
      {"-", :int8, "rtn", fn w, _ -> VivaTensor.quantize!(w, :int8) end},
      {"-", :int4, "rtn", fn w, _ -> VivaTensor.quantize!(w, :int4) end},
      {"-", :int4, "gptq",
       fn w, seen -> VivaTensor.quantize!(w, :int4, [method: :gptq] ++ seen) end}
    ]

    sparse =
      for kind <- @kinds,
          {format, how, make} <- [
            {:bf16, "-", &after_sparsify(&1, kind, :sparse24, [], &2)},
            {:int8, "then rtn", &after_sparsify(&1, kind, :sparse24, [values: :int8], &2)},
            {:int8, "one pass", &one_pass(&1, kind, :sparse24, [values: :int8], &2)},
            {:int4, "then rtn", &after_sparsify(&1, kind, :int4, [], &2)},
            {:int4, "one pass", &one_pass(&1, kind, :int4, [], &2)}
          ],
          do: {kind, format, how, make}

    dense ++ sparse
  end

  defp after_sparsify(weight, kind, format, options, seen) do
    seen = if kind == :magnitude, do: [], else: seen

    weight
    |> VivaTensor.sparsify!([method: kind] ++ seen)
    |> VivaTensor.quantize!(format, options)
  end

  defp one_pass(weight, kind, format, options, seen) do
    VivaTensor.quantize!(weight, format, [method: :gptq, sparsity: kind] ++ options ++ seen)
  end

  defp unzip(measures) do
    {for({e, _, _} <- measures, do: e), for({_, b, _} <- measures, do: b),
     for({_, _, n} <- measures, do: n)}
  end
end

Sparsity.run(System.argv())
