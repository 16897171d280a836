defmodule VivaTensor.Quantized do
  @moduledoc """
  A quantized tensor: codes and scales in native memory.

  Made by `VivaTensor.quantize/3`. `options` are the options that it was made
  with, every default filled in; `dtype` is what it was quantized from.
  """

  alias VivaTensor.{Error, Native}

  @enforce_keys [:ref, :format, :shape, :dtype, :options, :nbytes, :bits_per_weight]
  defstruct [:ref, :format, :shape, :dtype, :options, :nbytes, :bits_per_weight]

  @type t :: %__MODULE__{
          ref: reference,
          format: atom,
          shape: VivaTensor.Tensor.shape(),
          dtype: VivaTensor.Tensor.dtype(),
          options: %{optional(atom) => term},
          nbytes: non_neg_integer,
          bits_per_weight: float
        }

  @doc """
  One binary that holds everything, for another process, node or store.

      iex> t = VivaTensor.Tensor.from_list!(List.duplicate(0.5, 64), :f32, [64])
      iex> q = VivaTensor.quantize!(t, :nf4)
      iex> {:ok, binary} = VivaTensor.Quantized.dump(q)
      iex> VivaTensor.Quantized.load!(binary)
      #VivaTensor.Quantized<nf4[64] from f32, 4.500 bits per weight>
  """
  @spec dump(t) :: {:ok, binary} | {:error, Error.t()}
  def dump(%__MODULE__{ref: ref}), do: ref |> Native.quantized_dump() |> Error.wrap(:dump)

  @doc "Like `dump/1`, but raises `VivaTensor.Error`."
  @spec dump!(t) :: binary
  def dump!(quantized), do: Error.bang!(dump(quantized))

  @doc """
  What `dump/1` wrote; the binary is read in place.

  ## Errors

  `:invalid_dump` for anything else, however it is damaged.

      iex> {:error, error} = VivaTensor.Quantized.load("no dump")
      iex> elem(error.reason, 0)
      :invalid_dump
  """
  @spec load(binary) :: {:ok, t} | {:error, Error.t()}
  def load(binary) when is_binary(binary), do: binary |> Native.quantized_load() |> wrap(:load)

  @doc "Like `load/1`, but raises `VivaTensor.Error`."
  @spec load!(binary) :: t
  def load!(binary), do: Error.bang!(load(binary))

  @doc """
  Gives up the memory now instead of when it is garbage collected. Later calls
  fail with `:released`.
  """
  @spec release(t) :: :ok
  def release(%__MODULE__{ref: ref}), do: Native.quantized_release(ref)

  @doc false
  def wrap(result, op) do
    with {:ok, fields} <- Error.wrap(result, op), do: {:ok, struct!(__MODULE__, fields)}
  end

  defimpl Inspect do
    def inspect(%{format: format, shape: shape, dtype: dtype, bits_per_weight: bits}, _opts) do
      bits = :erlang.float_to_binary(bits, decimals: 3)
      shape = Enum.join(shape, ", ")
      "#VivaTensor.Quantized<#{format}[#{shape}] from #{dtype}, #{bits} bits per weight>"
    end
  end
end
