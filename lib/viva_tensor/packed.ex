defmodule VivaTensor.Packed do
  @moduledoc """
  A quantized matrix rearranged for this machine's kernels, in native memory.

  Made by `VivaTensor.prepack/2` and multiplied with by `VivaTensor.matmul/3`. It
  holds everything that a product needs, so what it was made of can be released; it
  is not written to files, and is no way back to the weights.
  """

  alias VivaTensor.{Error, Native}

  @enforce_keys [:ref, :format, :shape, :dtype, :nbytes]
  defstruct [:ref, :format, :shape, :dtype, :nbytes]

  @type t :: %__MODULE__{
          ref: reference,
          format: atom,
          shape: VivaTensor.Tensor.shape(),
          dtype: VivaTensor.Tensor.dtype(),
          nbytes: non_neg_integer
        }

  @doc """
  Gives up the memory now instead of when it is garbage collected. Later calls
  fail with `:released`.
  """
  @spec release(t) :: :ok
  def release(%__MODULE__{ref: ref}), do: Native.packed_release(ref)

  @doc false
  def wrap(result, op) do
    with {:ok, fields} <- Error.wrap(result, op), do: {:ok, struct!(__MODULE__, fields)}
  end

  defimpl Inspect do
    def inspect(%{format: format, shape: shape, nbytes: nbytes}, _opts) do
      "#VivaTensor.Packed<#{format}[#{Enum.join(shape, ", ")}], #{nbytes} bytes>"
    end
  end
end
