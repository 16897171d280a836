# Quantizes the matrices of a safetensors file, for programs that look at the bytes:
#
#     mix run test/oracle/quantize.exs FILE OUT FORMAT[:OPTION=VALUE,...] ...
#
# OUT/index.tsv has a line for each format and matrix that it can hold: what was
# asked for, the name, a file. The files are dumps: a safetensors image of the parts.

alias VivaTensor.{Checkpoint, Quantized, Tensor}

[file, out | asked] = System.argv()
File.mkdir_p!(out)
checkpoint = Checkpoint.open!(file)

value = fn text ->
  case Integer.parse(text) do
    {number, ""} -> number
    _ when text in ["true", "false"] -> text == "true"
    _ -> text
  end
end

specs =
  for spec <- asked do
    [format | options] = String.split(spec, ":")

    options =
      for option <- Enum.flat_map(options, &String.split(&1, ",")) do
        [key, text] = String.split(option, "=")
        {String.to_atom(key), value.(text)}
      end

    {spec, String.to_atom(format), options}
  end

names = for %{name: name} <- Checkpoint.contents!(checkpoint), do: name

index =
  for {name, i} <- Enum.with_index(names),
      {{spec, format, options}, j} <- Enum.with_index(specs) do
    tensor = Checkpoint.get!(checkpoint, name)

    case VivaTensor.quantize(tensor, format, options) do
      {:ok, quantized} ->
        File.write!(Path.join(out, "#{i}.#{j}"), Quantized.dump!(quantized))
        Quantized.release(quantized)
        Tensor.release(tensor)
        Enum.join([spec, name, "#{i}.#{j}"], "\t") <> "\n"

      # Rows that no block divides: another format is for them.
      {:error, %{reason: {:indivisible, _}}} ->
        ""
    end
  end

File.write!(Path.join(out, "index.tsv"), index)
