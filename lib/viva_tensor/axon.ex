defmodule VivaTensor.Axon do
  @moduledoc """
  Models of [Axon](https://hexdocs.pm/axon) whose dense layers stay quantized while they run.

      {:ok, {model, state}} = VivaTensor.Axon.quantize_model(model, state, :int8)
      Axon.predict(model, state, input)

  Axon and Nx are found where they are, and never required.
  """

  alias VivaTensor.{Error, Options, Quantized}

  @compile {:no_warn_undefined, [Axon, Nx, Nx.Type]}

  @typedoc "An `Axon` model."
  @type model :: struct

  @typedoc "An `Axon.ModelState`."
  @type state :: struct

  # What is not an option of the format.
  @own [include: nil, exclude: nil, compute: nil]

  @doc """
  The model with its dense layers multiplying with quantized kernels, straight from the
  codes, and its state without those kernels, which the model itself holds now.

  Layers keep their names, hooks and policies. Quantized kernels are not trained; gradients
  go through them to what is left in the state. Layers in a block or a namespace stay as
  they are.

  Options are those of `VivaTensor.quantize/3` for the format, and

    * `include:`, `exclude:` regular expressions, or strings of them, for the names of the
      layers that are quantized; by default all dense ones;
    * `compute:` the arithmetic, as `VivaTensor.matmul/3` has it.

  ## Errors

  Those of `VivaTensor.quantize/3`, with the name of the layer; `:invalid_option`, also when
  no layer is left.
  """
  @spec quantize_model(model, state, atom, keyword) ::
          {:ok, {model, state}} | {:error, Error.t()}
  def quantize_model(model, state, format, options \\ [])

  def quantize_model(
        %{__struct__: Axon} = model,
        %{__struct__: Axon.ModelState} = state,
        format,
        options
      ) do
    with {:ok, own, options} <- split(options),
         {:ok, [include, exclude, compute]} <- Options.take(:quantize_model, own, @own),
         {:ok, include} <- pattern("include", include || ""),
         {:ok, exclude} <- pattern("exclude", exclude || "(?!)"),
         chosen = Enum.filter(dense(model, state), &(elem(&1, 1) =~ include)),
         chosen = Enum.reject(chosen, &(elem(&1, 1) =~ exclude)),
         :ok <- some(chosen, model, state),
         {:ok, weights} <- quantize(chosen, state, format, options) do
      options = if compute, do: [compute: compute], else: []
      names = Enum.map(chosen, &elem(&1, 1))
      {:ok, {with_weights(model, weights, options), without_kernels(state, names)}}
    end
  end

  def quantize_model(%{__struct__: Axon}, state, _format, _options) do
    Error.option(:quantize_model, "state", "expected an Axon.ModelState, got #{inspect(state)}")
  end

  def quantize_model(model, _state, _format, _options) do
    Error.option(:quantize_model, "model", "expected an Axon model, got #{inspect(model)}")
  end

  @doc "Like `quantize_model/4`, but raises `VivaTensor.Error`."
  @spec quantize_model!(model, state, atom, keyword) :: {model, state}
  def quantize_model!(model, state, format, options \\ []),
    do: Error.bang!(quantize_model(model, state, format, options))

  @doc false
  # What Axon calls for a layer: with its input, its bias if it has one, and its options.
  def layer(x, options), do: VivaTensor.Nx.dot!(float(x), options[:weight], options[:product])

  @doc false
  def layer(x, bias, options),
    do: VivaTensor.Nx.dense!(float(x), options[:weight], bias, options[:product])

  # As a product with a kernel of floats makes it.
  defp float(x), do: Nx.as_type(x, Nx.Type.to_floating(Nx.type(x)))

  defp split(options) do
    if Keyword.keyword?(options) do
      {own, options} = Keyword.split(options, Keyword.keys(@own))
      {:ok, own, options}
    else
      message = "expected a keyword list, got #{inspect(options)}"
      Error.option(:quantize_model, "options", message)
    end
  end

  defp pattern(_option, %Regex{} = pattern), do: {:ok, pattern}

  defp pattern(option, source) when is_binary(source) do
    with {:error, {message, at}} <- Regex.compile(source) do
      Error.option(:quantize_model, option, "#{message} at position #{at} of #{inspect(source)}")
    end
  end

  defp pattern(option, other) do
    Error.option(:quantize_model, option, "expected a regular expression, got #{inspect(other)}")
  end

  # The nodes of dense layers that have a kernel in the state, and their names. A layer that
  # was given none is called by how many there are before it: inputs come first.
  defp dense(model, state) do
    nodes = Axon.reduce_nodes(model, [], &[&1 | &2])

    {found, _counts} =
      Enum.flat_map_reduce(nodes, %{}, fn node, counts ->
        name = node.name.(node.op_name, counts)
        found? = node.op == :dense and match?(%{"kernel" => _}, state.data[name])

        {if(found?, do: [{node.id, name}], else: []),
         Map.update(counts, node.op_name, 1, &(&1 + 1))}
      end)

    found
  end

  defp some([_ | _], _model, _state), do: :ok

  defp some([], model, state) do
    there = Enum.map_join(dense(model, state), ", ", &elem(&1, 1))
    message = "no dense layer is left; the model has: #{there}"
    Error.option(:quantize_model, "include", message)
  end

  defp quantize(layers, state, format, options) do
    Enum.reduce_while(layers, {:ok, %{}}, fn {id, name}, {:ok, weights} ->
      # Axon has kernels [k, n].
      weight =
        state.data[name]["kernel"] |> Nx.transpose() |> VivaTensor.Nx.quantize(format, options)

      case weight do
        {:ok, %Quantized{} = weight} ->
          {:cont, {:ok, Map.put(weights, id, weight)}}

        {:error, error} ->
          {:halt, {:error, %{error | message: "layer #{name}: #{error.message}"}}}
      end
    end)
  end

  defp with_weights(model, weights, options) do
    Axon.map_nodes(model, fn
      %{id: id, parameters: [_kernel | bias]} = node when is_map_key(weights, id) ->
        layer = if bias == [], do: &__MODULE__.layer/2, else: &__MODULE__.layer/3
        own = [weight: weights[id], product: options]
        arguments = List.delete(node.args, :parameter)
        %{node | op: layer, parameters: bias, args: arguments, opts: own ++ node.opts}

      node ->
        node
    end)
  end

  defp without_kernels(state, names) do
    Enum.reduce(names, state, fn name, state ->
      %{
        state
        | data: Map.update!(state.data, name, &Map.delete(&1, "kernel")),
          parameters: without(state.parameters, name),
          frozen_parameters: without(state.frozen_parameters, name)
      }
    end)
  end

  defp without(parameters, name) do
    case parameters do
      %{^name => names} when is_list(names) -> %{parameters | name => names -- ["kernel"]}
      _ -> parameters
    end
  end
end
