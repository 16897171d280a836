defmodule VivaTensor.Bumblebee do
  @moduledoc """
  Quantized checkpoints for [Bumblebee](https://hexdocs.pm/bumblebee).

      Bumblebee.load_model({:local, "model-nf4"},
        safetensors_reader: &VivaTensor.Bumblebee.safetensors_reader/1
      )

  `Bumblebee.load_model/2` takes a reader since the release after 0.7.0.
  """

  alias VivaTensor.Bumblebee.Weight
  alias VivaTensor.{Checkpoint, Error, Options}
  alias VivaTensor.Nx.Type

  @doc """
  The weights of a `.safetensors` file, in whichever layout they are, by the names that they
  have without quantization: what Bumblebee asks its `safetensors_reader:` for.

  Each is read, and dequantized, when Bumblebee comes to it, so that one at a time is there
  dequantized. Tensors that are not quantized are read from the mapped file.

  If the file is one of a model's directory, what a layout says in `config.json` is read
  there, and a weight whose parts lie in several files from all of them. A file of Hugging
  Face's cache has no such neighbours: a model in the layout `mlx` or `gptq_v2`, which need
  their config, has to be in a directory of its own.

  Options: `type:` of dequantized weights, `:f32` by default. Bumblebee casts it to the
  model's.

  Raises `VivaTensor.Error`, as Bumblebee expects no other answer than a map.
  """
  @spec safetensors_reader(Path.t(), type: VivaTensor.Nx.type()) :: %{String.t() => Weight.t()}
  def safetensors_reader(path, options \\ []) do
    [type] = Error.bang!(Options.take(:safetensors_reader, options, type: :f32))
    dtype = Error.bang!(Type.option(:safetensors_reader, type, nil))
    path = Path.expand(path)
    checkpoint = model(path) || Checkpoint.open!(path)
    file_of = Map.new(checkpoint.entries, &{&1.name, Path.expand(&1.file)})

    for content <- Checkpoint.contents!(checkpoint),
        # A weight in several files is told with the first of them.
        Map.fetch!(file_of, hd(content.tensors)) == path,
        into: %{} do
      weight = %Weight{
        checkpoint: checkpoint,
        name: content.name,
        shape: content.shape,
        dtype: if(content.layout, do: dtype, else: Type.named(content.format))
      }

      {content.name, weight}
    end
  end

  # The model that the file is a part of, with its config.
  defp model(path) do
    with {:ok, checkpoint} <- path |> Path.dirname() |> Checkpoint.open(),
         true <- path in Enum.map(checkpoint.files, &Path.expand/1) do
      checkpoint
    else
      _ -> nil
    end
  end
end
