defmodule VivaTensor.Conversion do
  @moduledoc """
  What a user asks for who has a quantized checkpoint: another layout.

  A conversion never quantizes what was not quantized. Each quantized weight of
  the source

  - stays as it is where the target layout holds it so,
  - gets the smallest format of the target that has the same values, where there
    is one: symmetric integers become asymmetric ones, integer zero points float
    ones, groups are cut into smaller ones, ggml's `q4_0`, `q4_1`, `q5_0`, `q5_1`
    and `q8_0` are integers in groups of 32,
  - is quantized again from its values where there is none, to as many bits or the
    next that the layout holds,
  - becomes floats where the layout has no place for it: embeddings and output
    heads but in `:mlx` and `:gguf`, shapes that its kernels do not take.

  What was done is in the report, for every tensor: **lossless** means that both
  decode to the same f32, bit for bit, zeros of both signs taken for equal, and
  was found by decoding both. Everything else has its SQNR against the values of
  the source.

  Tensors that are not quantized pass through, byte for byte, unless a `:dtype` is
  given, to which floats are then cast. Out of a GGUF file, whose floats are of
  several dtypes, into the bitsandbytes layout, whose loaders leave them so, that is
  f32. The gguf layout stores them as llama.cpp wants them: vectors in f32.

  The layout `:plain` is floats in safetensors files, as models are published,
  without a trace of quantization. From the GGUF file of a Llama it has
  `transformers`' names and order of rows, a `config.json`, and the tokenizer's
  files where that is byte-level BPE.
  """

  alias VivaTensor.{Error, Native, Recipe}

  @enforce_keys [:layout]
  defstruct [:layout, :dtype]

  @typedoc "`dtype` is that of floats; `nil` for the model's own."
  @type t :: %__MODULE__{layout: atom, dtype: :f32 | :f16 | :bf16 | nil}

  @doc """
  Checks a conversion.

  - `:layout` - `:plain`, or one of `VivaTensor.layouts/0`; required
  - `:dtype` - `:f32`, `:f16` or `:bf16`: casts floats

      iex> {:ok, conversion} = VivaTensor.Conversion.new(layout: :gptq_v2)
      iex> conversion.layout
      :gptq_v2
      iex> {:error, error} = VivaTensor.Conversion.new(layout: :plain, dtype: :int8)
      iex> Exception.message(error)
      ~s(conversion: option dtype: expected f32, f16 or bf16, got "int8")
  """
  @spec new(keyword) :: {:ok, t} | {:error, Error.t()}
  def new(opts) when is_list(opts) do
    case Keyword.split(opts, [:layout, :dtype]) do
      {_own, [{key, _} | _]} ->
        Error.option(:conversion, to_string(key), "no such option; it takes layout and dtype")

      {own, []} ->
        case Keyword.fetch(own, :layout) do
          {:ok, layout} when layout != nil -> check(layout, own[:dtype])
          _ -> Error.option(:conversion, "layout", "is required, for example layout: :gguf")
        end
    end
  end

  defp check(layout, dtype) do
    with {:ok, {layout, dtype}} <-
           layout |> Native.conversion_check(dtype) |> Error.wrap(:conversion) do
      {:ok, %__MODULE__{layout: layout, dtype: dtype}}
    end
  end

  @doc false
  # Decides for every tensor of an opened checkpoint.
  @spec plan(t, map) :: {:ok, map} | {:error, Error.t()}
  def plan(%__MODULE__{} = conversion, checkpoint) do
    outer = checkpoint.entries |> Enum.map(& &1.name) |> Recipe.outer_modules()

    checkpoint.ref
    |> Native.conversion_plan(conversion.layout, conversion.dtype, outer)
    |> Error.wrap(:source)
  end

  @doc "A conversion as plain data, for `report.json`."
  @spec to_map(t) :: map
  def to_map(%__MODULE__{} = conversion), do: Map.from_struct(conversion)
end
