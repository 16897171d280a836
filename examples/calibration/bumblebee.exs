# Records what the linear layers of a Bumblebee model meet, while it runs in this node.
#
#     elixir examples/calibration/bumblebee.exs MODEL_DIR TEXT OUT.safetensors
#
# Every window of the text is one run; a hook before each dense layer adds what comes
# in to a VivaTensor.Calibration. In an application of your own, attach the hooks to the
# model that serves, and save the calibration when enough has passed.

Mix.install([
  {:bumblebee, "~> 0.6"},
  {:exla, "~> 0.9"},
  {:viva_tensor, path: Path.expand("../..", __DIR__)}
])

defmodule Record do
  alias VivaTensor.{Calibration, Tensor}

  @window 256
  @tokens 8192

  def run(directory, text, out) do
    {:ok, %{model: model, params: params, spec: spec}} = Bumblebee.load_model({:local, directory})
    {:ok, tokenizer} = Bumblebee.load_tokenizer({:local, directory})
    calibration = Calibration.new()

    {_init, predict} = model |> observed(names(spec), calibration) |> Axon.build(compiler: EXLA)

    for ids <- windows(tokenizer, File.read!(text)) do
      predict.(params, %{"input_ids" => ids, "attention_mask" => Nx.broadcast(1, ids)})
    end

    Calibration.save!(calibration, out)
    IO.puts("#{out}: #{length(Calibration.layers(calibration))} layers")
  end

  # The model with a hook before each of its dense layers that has a name in the files.
  defp observed(model, names, calibration) do
    Axon.map_nodes(model, fn
      %Axon.Node{op: :dense, hooks: hooks, name: name} = node ->
        case name.(:dense, %{}) |> in_files(names) do
          nil ->
            node

          layer ->
            %{node | hooks: [{:pre_forward, :inference, &add(calibration, layer, &1)} | hooks]}
        end

      node ->
        node
    end)
  end

  defp add(calibration, layer, x) do
    {kind, bits} = Nx.type(x)
    x = Tensor.from_binary!(Nx.to_binary(x), :"#{kind}#{bits}", Tuple.to_list(Nx.shape(x)))
    Calibration.add!(calibration, layer, x)
  end

  # Bumblebee has names of its own, and knows those of the files.
  defp names(spec) do
    for {ours, theirs} <- Bumblebee.HuggingFace.Transformers.Model.params_mapping(spec),
        is_binary(theirs) do
      pattern = ours |> Regex.escape() |> String.replace("\\{n\\}", "(\\d+)")
      {Regex.compile!("^" <> pattern <> "$"), theirs}
    end
  end

  defp in_files(name, names) do
    Enum.find_value(names, fn {pattern, theirs} ->
      with [_ | numbers] <- Regex.run(pattern, name) do
        Enum.reduce(numbers, theirs, &String.replace(&2, "{n}", &1, global: false))
      end
    end)
  end

  # Whole windows only: padding is nothing that a layer should be quantized for.
  defp windows(tokenizer, text) do
    %{"input_ids" => ids} = Bumblebee.apply_tokenizer(tokenizer, text)
    count = min(Nx.axis_size(ids, 1), @tokens) |> div(@window)
    for at <- 0..(count - 1)//1, do: Nx.slice_along_axis(ids, at * @window, @window, axis: 1)
  end
end

case System.argv() do
  [directory, text, out] -> Record.run(directory, text, out)
  _ -> IO.puts(:stderr, "usage: elixir bumblebee.exs MODEL_DIR TEXT OUT.safetensors")
end
