defmodule VivaTensor.Nx.Gradient do
  @moduledoc false
  # The way back through a product with a quantized weight, which itself is not trained.

  alias VivaTensor.{Error, Quantized}

  @compile {:no_warn_undefined, [Nx, Nx.Defn.Kernel]}

  @doc "The traced product y, with the gradients of those of its operands that are traced."
  def through(y, operands, weight) do
    given = operands |> Tuple.to_list() |> Enum.zip([:x, :bias])
    traced = for {%{data: %{__struct__: Nx.Defn.Expr}}, _} = pair <- given, do: pair

    Nx.Defn.Kernel.custom_grad(y, Enum.map(traced, &elem(&1, 0)), fn g ->
      g = Nx.rename(g, List.duplicate(nil, Nx.rank(g)))
      for {operand, which} <- traced, do: which |> gradient(g, weight) |> Nx.as_type(operand.type)
    end)
  end

  # y = x · wᵀ, so that what comes back goes through w itself.
  defp gradient(:x, g, weight), do: Nx.dot(g, [-1], values(g, weight), [0])

  defp gradient(:bias, g, _weight),
    do: Nx.sum(g, axes: Enum.to_list(0..(Nx.rank(g) - 2)//1))

  # The weight as floats, read when the gradient is computed: a call takes some tensor.
  defp values(g, %Quantized{shape: [n, k]} = weight) do
    one = g |> Nx.devectorize() |> Nx.flatten() |> Nx.slice([0], [1])
    Nx.runtime_call(Nx.template({n, k}, :f32), one, [weight: weight], &__MODULE__.dequantize!/2)
  end

  defp values(_g, weight) do
    message =
      "no gradient goes through packed weights, got #{inspect(weight)}; give the " <>
        "VivaTensor.Quantized that they were made of"

    {:error, error} = Error.option(:dot, "weight", message)
    raise error
  end

  @doc "What a compiled computation calls."
  def dequantize!(_one, options), do: VivaTensor.Nx.dequantize!(options[:weight], type: :f32)
end
