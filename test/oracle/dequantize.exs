# Writes the weights that the library reads from a quantized directory:
#
#     mix run test/oracle/dequantize.exs DIR OUT [DTYPE]
#
# OUT/index.tsv has a line for each of them: name, dtype, shape, file. The files
# hold the values, row-major and little-endian.

alias VivaTensor.{Checkpoint, Quantized, Tensor}

[dir, out | asked] = System.argv()
File.mkdir_p!(out)
checkpoint = Checkpoint.open!(dir)

quantized =
  for %{layout: layout, name: name} when layout != nil <- Checkpoint.contents!(checkpoint),
      do: {name, layout}

index =
  for {{name, layout}, i} <- Enum.with_index(quantized) do
    %Quantized{} = q = Checkpoint.get!(checkpoint, name)
    # An LLM.int8() file keeps no dtype, and bitsandbytes dequantizes it to f32.
    # compressed-tensors computes in the dtype of its scales or of the model, mlx in
    # that of its scales.
    exact = q.format == :int8 or to_string(layout) in ["compressed-tensors", "mlx"]
    dtype = if exact, do: :f32, else: q.dtype
    dtype = List.first(Enum.map(asked, &String.to_atom/1), dtype)
    tensor = VivaTensor.dequantize!(q, dtype: dtype)
    File.write!(Path.join(out, "#{i}.bin"), Tensor.to_binary!(tensor))
    Enum.join([name, dtype, Enum.join(tensor.shape, "x"), "#{i}.bin"], "\t") <> "\n"
  end

File.write!(Path.join(out, "index.tsv"), index)
