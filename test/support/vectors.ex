defmodule VivaTensor.Test.Vectors do
  @moduledoc """
  Vectors to compress: a real embedding matrix, and files of them.
  """

  alias VivaTensor.{Checkpoint, Tensor}
  alias VivaTensor.Test.Safetensors

  @model "examples/models/viva-tiny"

  @doc "The embedding matrix of the bundled model: f32 vectors, and their dimension."
  def words do
    tensor = @model |> Checkpoint.open!() |> Checkpoint.get!("model.embed_tokens.weight")
    [_count, dimension] = tensor.shape
    {tensor |> Tensor.cast!(:f32) |> Tensor.to_binary!() |> split(dimension), dimension}
  end

  @doc "Vectors around some directions, made by chance: `count` binaries of f32."
  def clustered(count, dimension, seed \\ 1) do
    centers = 10 |> Kernel.*(dimension) |> Safetensors.normal(99) |> split(dimension)
    noise = count |> Kernel.*(dimension) |> Safetensors.normal(seed) |> split(dimension)

    for {noise, i} <- Enum.with_index(noise) do
      center = Enum.at(centers, rem(i, 10))

      for {a, b} <- Enum.zip(floats(center), floats(noise)),
          into: <<>>,
          do: <<a + b::little-float-32>>
    end
  end

  @doc "A `.safetensors` file of one matrix."
  def safetensors!(path, vectors, dimension) do
    bytes = IO.iodata_to_binary(vectors)
    Safetensors.write!(path, [{"vectors", "F32", [length(vectors), dimension], bytes}])
  end

  @doc "A `.npy` file, as `numpy.save` writes it."
  def npy!(path, vectors, dimension) do
    shape = "(#{length(vectors)}, #{dimension})"
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': #{shape}, }"
    header = String.pad_trailing(header, 117) <> "\n"
    File.write!(path, [<<0x93, "NUMPY", 1, 0, byte_size(header)::little-16>>, header | vectors])
    path
  end

  @doc "A binary as binaries of `dimension` f32."
  def split(binary, dimension) do
    bytes = 4 * dimension
    for at <- 0..(byte_size(binary) - bytes)//bytes, do: binary_part(binary, at, bytes)
  end

  @doc "The numbers of a binary of f32."
  def floats(binary), do: for(<<x::little-float-32 <- binary>>, do: x)
end
