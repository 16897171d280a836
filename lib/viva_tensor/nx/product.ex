defmodule VivaTensor.Nx.Product do
  @moduledoc false
  # A product with a quantized weight: now, or as a call in a computation that is traced.

  alias VivaTensor.{Error, Options, Packed, Quantized}
  alias VivaTensor.Nx.{Gradient, Type}

  @compile {:no_warn_undefined, Nx}

  @doc "x · wᵀ, and a bias where there is one."
  def product(op, x, weight, bias, options) do
    with {:ok, [type, compute]} <- Options.take(op, options, type: nil, compute: nil),
         :ok <- tensor(op, "x", x),
         :ok <- bias(op, bias),
         {:ok, n} <- units(op, x, weight, bias),
         {:ok, dtype} <- dtype(op, x, bias, type) do
      axes = x.vectorized_axes
      x = Nx.devectorize(x, keep_names: false)
      names = List.replace_at(x.names, -1, nil)
      compute = if compute, do: [compute: compute], else: []
      call = [op: op, weight: weight, names: names, options: [dtype: dtype] ++ compute]
      operands = if bias, do: {x, bias}, else: {x}

      with {:ok, y} <- run(operands, call, fn -> template(op, x, n, dtype, names) end) do
        {:ok, Nx.vectorize(y, axes)}
      end
    end
  end

  # Where one operand has no values yet, the product is a node of what is traced.
  defp run(operands, call, template) do
    if operands |> Tuple.to_list() |> Enum.any?(&traced?/1) do
      with {:ok, template} <- template.() do
        y = Nx.runtime_call(template, operands, call, &__MODULE__.multiply!/2)
        {:ok, Gradient.through(y, operands, call[:weight])}
      end
    else
      multiply(operands, call)
    end
  end

  @doc "What a compiled computation calls."
  def multiply!(operands, call), do: operands |> multiply(call) |> Error.bang!()

  defp multiply(operands, call) do
    op = call[:op]

    with {:ok, x} <- VivaTensor.Nx.read(op, elem(operands, 0)),
         {:ok, options} <- with_bias(op, operands, call[:options]),
         {:ok, y} <- VivaTensor.matmul(x, call[:weight], options) do
      VivaTensor.Nx.give(op, y, call[:names])
    else
      {:error, error} -> {:error, %{error | op: op}}
    end
  end

  defp with_bias(_op, {_x}, options), do: {:ok, options}

  defp with_bias(op, {_x, bias}, options) do
    with {:ok, bias} <- VivaTensor.Nx.read(op, bias), do: {:ok, [bias: bias] ++ options}
  end

  defp traced?(%{data: %{__struct__: backend}}), do: backend == Nx.Defn.Expr

  defp template(op, x, n, dtype, names) do
    if function_exported?(Nx, :runtime_call, 4) do
      with {:ok, type} <- Type.type(op, dtype) do
        {:ok, Nx.template(put_elem(x.shape, tuple_size(x.shape) - 1, n), type, names: names)}
      end
    else
      message = "Nx 0.11 or newer is needed inside defn: this one has no Nx.runtime_call/4"
      {:error, Error.new(op, {:missing_library, %{library: "nx"}}, message)}
    end
  end

  defp tensor(_op, _name, %{__struct__: Nx.Tensor}), do: :ok

  defp tensor(op, name, other) do
    Error.option(op, name, "expected an Nx.Tensor, got #{inspect(other)}")
  end

  defp bias(_op, nil), do: :ok

  defp bias(op, %{__struct__: Nx.Tensor, vectorized_axes: [_ | _] = axes}) do
    Error.option(op, "bias", "expected one for all of x, got one for each of #{inspect(axes)}")
  end

  defp bias(op, bias), do: tensor(op, "bias", bias)

  # The n of a weight [n, k] that x and bias fit.
  defp units(op, x, %{__struct__: struct, shape: shape}, bias)
       when struct in [Quantized, Packed] do
    rank = tuple_size(x.shape)

    case shape do
      [_n, k] when rank == 0 or :erlang.element(rank, x.shape) != k ->
        mismatch(op, "x, whose last axis is the k of the weight [n, k]", [k], x.shape)

      [n, _k] when bias != nil and bias.shape != {n} ->
        mismatch(op, "the bias of a weight [n, k]", [n], bias.shape)

      [n, _k] ->
        {:ok, n}

      _ ->
        mismatch(op, "a quantized matrix [n, k]", [1, List.last(shape) || 1], shape)
    end
  end

  defp units(op, _x, other, _bias) do
    message = "expected a VivaTensor.Quantized or VivaTensor.Packed, got #{inspect(other)}"
    Error.option(op, "weight", message)
  end

  defp mismatch(op, what, expected, actual) do
    actual = if is_tuple(actual), do: Tuple.to_list(actual), else: actual
    message = "#{what}: expected shape #{inspect(expected)}, got #{inspect(actual)}"
    reason = {:shape_mismatch, %{what: what, expected: expected, actual: actual}}
    {:error, Error.new(op, reason, message)}
  end

  # The dtype of the result; all three are floats.
  defp dtype(op, x, bias, type) do
    with {:ok, own} <- float(op, x),
         {:ok, _} <- if(bias, do: float(op, bias), else: {:ok, own}),
         {:ok, dtype} <- Type.option(op, type, own) do
      Type.float(op, dtype)
    end
  end

  defp float(op, tensor) do
    with {:ok, dtype} <- Type.dtype(op, tensor.type), do: Type.float(op, dtype)
  end
end
