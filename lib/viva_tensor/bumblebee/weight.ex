defmodule VivaTensor.Bumblebee.Weight do
  @moduledoc """
  A weight of a checkpoint that nobody has read yet: an `Nx.LazyContainer` of one tensor.

      Nx.to_tensor(weight)
  """

  alias VivaTensor.{Checkpoint, Quantized, Tensor}

  @enforce_keys [:checkpoint, :name, :shape, :dtype]
  defstruct [:checkpoint, :name, :shape, :dtype]

  @typedoc "`dtype` is `nil` for what no dtype holds; such a tensor can be named, not read."
  @type t :: %__MODULE__{
          checkpoint: Checkpoint.t(),
          name: String.t(),
          shape: Tensor.shape(),
          dtype: Tensor.dtype() | nil
        }

  @doc false
  @spec read!(t) :: Tensor.t()
  def read!(%__MODULE__{checkpoint: checkpoint, name: name, dtype: dtype}) do
    with %Quantized{} = quantized <- Checkpoint.get!(checkpoint, name) do
      values = VivaTensor.dequantize!(quantized, dtype: dtype)
      # The next one may come before this one is collected.
      :ok = Quantized.release(quantized)
      values
    end
  end

  defimpl Inspect do
    def inspect(%{name: name, dtype: dtype, shape: shape}, _opts) do
      "#VivaTensor.Bumblebee.Weight<#{name} #{dtype}[#{Enum.join(shape, ", ")}]>"
    end
  end
end
