# An embedding model before and after its dense layers are quantized.
#
#     mix run examples/nx/embeddings.exs MODEL_DIR [FORMAT]...
#
# MODEL_DIR is of a BERT that Bumblebee loads, with a vocab.txt. Bumblebee has to be among
# the dependencies, or on VIVA_TENSOR_NX_EBIN. Prints a line for each format: the bytes of
# the encoder's kernels, the seconds that the sentences take, the least cosine between the
# embedding of one before and after, and of how many the nearest other one is the same.

{:ok, _} = Application.ensure_all_started(:nx)

defmodule Embeddings do
  @sentences [
    "a dog runs outside",
    "the puppy plays",
    "banks raised interest rates",
    "inflation worries investors"
  ]

  def run(directory, formats) do
    {:ok, %{model: model, params: state}} =
      Bumblebee.load_model({:local, directory}, architecture: :base)

    inputs = tokens(directory)
    {before, seconds} = embed(model, state, inputs)
    row("f32", bytes(state), seconds, before, before)

    for format <- formats do
      {quantized, rest} =
        VivaTensor.Axon.quantize_model!(model, state, format, include: "encoder")

      {embeddings, seconds} = embed(quantized, rest, inputs)
      row(format, held(quantized), seconds, embeddings, before)
    end
  end

  # Every word is a token of its own.
  defp tokens(directory) do
    words = directory |> Path.join("vocab.txt") |> File.stream!() |> Stream.map(&String.trim/1)
    ids = words |> Enum.with_index() |> Map.new()

    rows =
      for sentence <- @sentences do
        Enum.map(["[CLS]"] ++ String.split(sentence) ++ ["[SEP]"], &Map.fetch!(ids, &1))
      end

    longest = rows |> Enum.map(&length/1) |> Enum.max()
    padded = Enum.map(rows, &(&1 ++ List.duplicate(0, longest - length(&1))))
    ids = Nx.tensor(padded)
    %{"input_ids" => ids, "attention_mask" => Nx.greater(ids, 0)}
  end

  # The mean of the tokens of each sentence, of length one.
  defp embed(model, state, inputs) do
    {microseconds, %{hidden_state: tokens}} =
      :timer.tc(fn -> Axon.predict(model, state, inputs) end)

    mask = Nx.new_axis(inputs["attention_mask"], -1)
    sum = tokens |> Nx.multiply(mask) |> Nx.sum(axes: [1])
    length = sum |> Nx.pow(2) |> Nx.sum(axes: [1], keep_axes: true) |> Nx.sqrt()
    {Nx.divide(sum, length), microseconds / 1.0e6}
  end

  defp bytes(state) do
    for {"encoder" <> _, %{"kernel" => kernel}} <- state.data, reduce: 0 do
      sum -> sum + Nx.byte_size(kernel)
    end
  end

  defp held(model) do
    Axon.reduce_nodes(model, 0, fn node, sum ->
      case node.opts[:weight] do
        %VivaTensor.Quantized{nbytes: nbytes} -> sum + nbytes
        nil -> sum
      end
    end)
  end

  defp row(format, bytes, seconds, embeddings, before) do
    cosine = embeddings |> Nx.multiply(before) |> Nx.sum(axes: [1]) |> Nx.reduce_min()
    same = Nx.equal(neighbours(embeddings), neighbours(before)) |> Nx.sum() |> Nx.to_number()

    IO.puts(
      "| #{format} | #{megabytes(bytes)} MB | #{Float.round(seconds, 1)} s " <>
        "| #{cosine |> Nx.to_number() |> Float.round(4)} | #{same} of #{length(@sentences)} |"
    )
  end

  defp megabytes(bytes), do: Float.round(bytes / 1.0e6, 1)

  defp neighbours(embeddings) do
    others = Nx.subtract(1, Nx.eye(Nx.axis_size(embeddings, 0)))
    embeddings |> Nx.dot([1], embeddings, [1]) |> Nx.multiply(others) |> Nx.argmax(axis: 1)
  end
end

case System.argv() do
  [directory | formats] ->
    Embeddings.run(directory, Enum.map(formats, &String.to_atom/1))

  [] ->
    IO.puts(:stderr, "usage: mix run examples/nx/embeddings.exs MODEL_DIR [FORMAT]...")
end
