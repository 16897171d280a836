# The tables of docs/formats.md: every format with the layouts that hold it, and what
# it makes of normal numbers and of a trained model. `make formats` writes them:
#
#     mix run -r bench/formats_table.exs -e 'FormatsTable.write()'

defmodule FormatsTable do
  alias VivaTensor.{Checkpoint, CLI, Quantized, Recipe, Table, Tensor}

  @file_name "docs/formats.md"
  @model "examples/models/viva-tiny"
  @shape [1024, 1024]
  @mark "<!-- The rest of this page is written by `make formats`. -->\n"

  # The page about each family, by the formats that it is about.
  @pages [
    {"integers", ~r/^int/},
    {"bitsandbytes", ~r/^(nf4|fp4|dynamic8)$/},
    {"fp8", ~r/^fp8/},
    {"mx", ~r/^(mx|nvfp4)/},
    {"sparse24", ~r/^sparse24/},
    {"ggml", ~r/^i?q\d/}
  ]

  @doc "Replaces the tables of the page."
  def write, do: File.write!(@file_name, page())

  @doc "The whole page with tables made afresh."
  def page do
    [head, _tables] = @file_name |> File.read!() |> String.split(@mark)
    IO.iodata_to_binary([head, @mark, holders(), measures()])
  end

  @doc "Every layout that holds each format as it is by default."
  def layouts do
    for %{name: format} <- VivaTensor.formats() do
      held = for %{name: layout} <- VivaTensor.layouts(), recipe(format, layout), do: layout
      {format, held}
    end
  end

  defp recipe(format, layout) do
    case Recipe.new(format: format, layout: layout) do
      {:ok, recipe} -> recipe
      {:error, _} -> nil
    end
  end

  defp holders do
    columns = [
      {"format", :left},
      {"what it is", :left},
      {"layouts, read and written", :left},
      {"without --layout", :left},
      {"matmul", :left}
    ]

    rows =
      for {{format, held}, %{about: about}} <- Enum.zip(layouts(), VivaTensor.formats()) do
        usual = recipe(format, nil)
        [link(format), about, Enum.join(held, ", "), usual && usual.layout, matmul(format)]
      end

    ["\n## Where each is stored\n\n", Table.markdown(columns, rows)]
  end

  defp link(format) do
    case Enum.find(@pages, fn {_, formats} -> to_string(format) =~ formats end) do
      {page, _} -> "[`#{format}`](formats/#{page}.md)"
      nil -> "`#{format}`"
    end
  end

  # What a product of the library takes.
  defp matmul(format) do
    weight = Tensor.from_binary!(CLI.Quality.draws([2, 256]), :f32, [2, 256])
    x = Tensor.from_binary!(CLI.Quality.draws([1, 256]), :f32, [1, 256])

    computed =
      for {compute, options} <- [f32: [], int8: [], llm_int8: [scale: :absmax]],
          {:ok, q} <- [VivaTensor.quantize(weight, format, options)],
          {:ok, _} <- [VivaTensor.matmul(x, q, compute: compute)],
          do: compute

    Enum.join(computed, ", ")
  end

  defp measures do
    normal = [Tensor.from_binary!(CLI.Quality.draws(@shape), :f32, @shape)]
    trained = weights()

    columns = [
      {"format", :left},
      {"method", :left},
      {"N(0, 1): bits per weight", :right},
      {"SQNR dB", :right},
      {"viva-tiny: bits per weight", :right},
      {"SQNR dB", :right}
    ]

    rows =
      for %{name: format} <- VivaTensor.formats(), method <- methods(format) do
        [format, method] ++ measure(normal, format, method) ++ measure(trained, format, method)
      end

    [
      "\n## What each makes of weights\n\n",
      "N(0, 1) is #{Enum.join(@shape, " x ")} normal numbers; viva-tiny is the ",
      "#{length(trained)} linear weights of the model in `#{@model}`, taken together. Options ",
      "are the defaults. Bits count codes, scales and zero points.\n\n",
      Table.markdown(columns, rows)
    ]
  end

  defp methods(format) do
    tensor = Tensor.from_binary!(CLI.Quality.draws([1, 256]), :f32, [1, 256])
    takes = &match?({:ok, _}, VivaTensor.quantize(tensor, format, method: &1))
    Enum.filter([:rtn, :mse, :hqq], takes)
  end

  defp weights do
    checkpoint = Checkpoint.open!(@model)
    {:ok, recipe} = Recipe.new(format: :int8)

    for entry <- checkpoint.entries,
        Recipe.decide(recipe, entry, checkpoint.config) == :quantize,
        do: Checkpoint.get!(checkpoint, entry.name)
  end

  # Bits per weight and SQNR of tensors together: energies of signals and errors
  # add up.
  defp measure(tensors, format, method) do
    sums =
      for tensor <- tensors do
        quantized = VivaTensor.quantize!(tensor, format, method: method)
        %{mse: mse, sqnr_db: sqnr_db} = VivaTensor.metrics!(tensor, quantized)
        Quantized.release(quantized)
        count = Enum.product(tensor.shape)
        noise = mse * count
        {quantized.nbytes * 8, count, noise, noise * :math.pow(10, sqnr_db / 10)}
      end

    [bits, count, noise, signal] = for i <- 0..3, do: sums |> Enum.map(&elem(&1, i)) |> Enum.sum()
    [decimals(bits / count, 4), decimals(10 * :math.log10(signal / noise), 2)]
  end

  defp decimals(number, decimals), do: :erlang.float_to_binary(number, decimals: decimals)
end
