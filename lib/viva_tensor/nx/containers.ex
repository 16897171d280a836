defmodule VivaTensor.Nx.Containers do
  @moduledoc false
  # What Nx takes as arguments. Protocols have to be there when they are implemented:
  # Mix compiles this anew when Nx came or went.

  @present Code.ensure_loaded?(Nx.Container)

  def __mix_recompile__?, do: Code.ensure_loaded?(Nx.Container) != @present

  if @present do
    defimpl Nx.Container, for: [VivaTensor.Quantized, VivaTensor.Packed] do
      # None of it is a tensor that a compiler could move or trace.
      def traverse(weight, acc, _fun), do: {weight, acc}
      def reduce(_weight, acc, _fun), do: acc

      def serialize(%VivaTensor.Quantized{} = weight),
        do: {__MODULE__, [], VivaTensor.Quantized.dump!(weight)}

      def serialize(%VivaTensor.Packed{}) do
        raise ArgumentError,
              "packed weights are for one machine; serialize the VivaTensor.Quantized"
      end

      def deserialize([], dump), do: VivaTensor.Quantized.load!(dump)
    end

    defimpl Nx.LazyContainer, for: VivaTensor.Tensor do
      def traverse(tensor, acc, fun) do
        {:ok, type} = VivaTensor.Nx.Type.type(:to_nx, tensor.dtype)
        template = Nx.template(List.to_tuple(tensor.shape), type)
        fun.(template, fn -> VivaTensor.Nx.to_nx!(tensor) end, acc)
      end
    end
  end
end
