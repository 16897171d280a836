defmodule VivaTensor.Nx.Containers do
  @moduledoc false
  # What Nx takes as arguments. Protocols have to be there when they are implemented:
  # Mix compiles this anew when Nx came or went.

  @compile {:no_warn_undefined, Nx}
  @present Code.ensure_loaded?(Nx.Container)

  def __mix_recompile__?, do: Code.ensure_loaded?(Nx.Container) != @present

  @doc "Gives `fun` the template of a tensor, and what reads it."
  def lazy(%{dtype: dtype, shape: shape}, acc, fun, read) do
    type = VivaTensor.Error.bang!(VivaTensor.Nx.Type.type(:to_nx, dtype))
    template = Nx.template(List.to_tuple(shape), type)
    fun.(template, fn -> VivaTensor.Nx.to_nx!(read.()) end, acc)
  end

  if @present do
    # Nothing of a weight is a tensor that a compiler could move or trace.
    defimpl Nx.Container, for: VivaTensor.Quantized do
      def traverse(weight, acc, _fun), do: {weight, acc}
      def reduce(_weight, acc, _fun), do: acc
      def serialize(weight), do: {__MODULE__, [], VivaTensor.Quantized.dump!(weight)}
      def deserialize([], dump), do: VivaTensor.Quantized.load!(dump)
    end

    defimpl Nx.Container, for: VivaTensor.Packed do
      def traverse(weight, acc, _fun), do: {weight, acc}
      def reduce(_weight, acc, _fun), do: acc

      def serialize(_weight) do
        raise ArgumentError,
              "packed weights are for one machine; serialize the VivaTensor.Quantized"
      end
    end

    defimpl Nx.LazyContainer, for: VivaTensor.Tensor do
      def traverse(tensor, acc, fun),
        do: VivaTensor.Nx.Containers.lazy(tensor, acc, fun, fn -> tensor end)
    end

    defimpl Nx.LazyContainer, for: VivaTensor.Bumblebee.Weight do
      alias VivaTensor.Bumblebee.Weight

      def traverse(weight, acc, fun),
        do: VivaTensor.Nx.Containers.lazy(weight, acc, fun, fn -> Weight.read!(weight) end)
    end
  end
end
