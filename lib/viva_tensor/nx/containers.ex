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

    defimpl Nx.LazyContainer, for: [VivaTensor.Tensor, VivaTensor.Bumblebee.Weight] do
      alias VivaTensor.Bumblebee.Weight

      def traverse(%{dtype: dtype, shape: shape} = lazy, acc, fun) do
        type = VivaTensor.Error.bang!(VivaTensor.Nx.Type.type(:to_nx, dtype))
        template = Nx.template(List.to_tuple(shape), type)
        fun.(template, fn -> lazy |> dense() |> VivaTensor.Nx.to_nx!() end, acc)
      end

      defp dense(%VivaTensor.Tensor{} = tensor), do: tensor
      defp dense(%Weight{} = weight), do: Weight.read!(weight)
    end
  end
end
