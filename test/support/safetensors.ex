defmodule VivaTensor.Test.Safetensors do
  @moduledoc """
  Safetensors files made and read without the library under test.
  """

  alias VivaTensor.Native

  @doc "Writes a file of `{name, dtype, shape, bytes}` tensors, in this order."
  def write!(path, tensors) do
    {entries, _} =
      Enum.map_reduce(tensors, 0, fn {name, dtype, shape, bytes}, offset ->
        next = offset + byte_size(bytes)

        {~s("#{name}":{"dtype":"#{dtype}","shape":[#{Enum.join(shape, ",")}],) <>
           ~s("data_offsets":[#{offset},#{next}]}), next}
      end)

    header = "{" <> Enum.join(entries, ",") <> "}"
    # Tensors start on a multiple of eight, as the reference writer has it.
    header = String.pad_trailing(header, div(byte_size(header) + 7, 8) * 8)
    data = for {_, _, _, bytes} <- tensors, do: bytes

    File.mkdir_p!(Path.dirname(path))
    File.write!(path, [<<byte_size(header)::little-64>>, header | data])
    path
  end

  @doc "Reads a file, or all files of a directory, into `%{name => {dtype, shape, bytes}}`."
  def read!(path) do
    if File.dir?(path) do
      [path, "*.safetensors"]
      |> Path.join()
      |> Path.wildcard()
      |> Enum.map(&read!/1)
      |> Enum.reduce(%{}, &Map.merge/2)
    else
      <<size::little-64, header::binary-size(size), data::binary>> = File.read!(path)
      {:ok, header} = Native.json_decode(header)

      for {name, %{"dtype" => dtype, "shape" => shape, "data_offsets" => [from, to]}} <- header,
          into: %{},
          do: {name, {dtype, shape, binary_part(data, from, to - from)}}
    end
  end

  @doc "Normally distributed f32 values, the same for the same seed."
  def normal(count, seed) do
    state = :rand.seed_s(:exsss, seed)

    {values, _} = Enum.map_reduce(1..count//1, state, fn _, state -> :rand.normal_s(state) end)

    for value <- values, into: <<>>, do: <<value::little-float-32>>
  end

  @doc "f32 bytes with the value at `index` replaced by NaN, `:inf` or `:neg_inf`."
  def poison(bytes, index, what) do
    at = index * 4
    before = binary_part(bytes, 0, at)
    rest = binary_part(bytes, at + 4, byte_size(bytes) - at - 4)

    pattern =
      case what do
        :nan -> <<0, 0, 0xC0, 0x7F>>
        :inf -> <<0, 0, 0x80, 0x7F>>
        :neg_inf -> <<0, 0, 0x80, 0xFF>>
      end

    before <> pattern <> rest
  end
end
