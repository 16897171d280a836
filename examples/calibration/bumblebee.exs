# Records what the linear layers of a Bumblebee model meet, while it runs in this node.
#
#     elixir examples/calibration/bumblebee.exs MODEL_DIR TEXT OUT.safetensors
#
# Every window of the text is one run; a hook before each dense layer sends what comes
# in, which is added to a VivaTensor.Calibration. In an application of your own, attach
# the hooks to the model that serves, and save the calibration when enough has passed.

Mix.install(
  [
    {:bumblebee, "~> 0.6"},
    {:exla, "~> 0.9"},
    {:viva_tensor, path: Path.expand("../..", __DIR__)}
  ],
  config: [nx: [default_backend: EXLA.Backend, default_defn_options: [compiler: EXLA]]]
)

defmodule Recorder do
  alias VivaTensor.{Calibration, Checkpoint, Tensor}

  @window 256
  @tokens 8192

  def run(directory, text, out) do
    {:ok, model} = Bumblebee.load_model({:local, directory})
    {:ok, tokenizer} = Bumblebee.load_tokenizer({:local, directory})
    windows = tokenizer |> windows(File.read!(text), @window) |> Enum.take(div(@tokens, @window))

    calibration = record(model, names(model.spec, directory), windows)
    Calibration.save!(calibration, out)
    IO.puts("#{out}: #{length(Calibration.layers(calibration))} layers")
  end

  @doc "The calibration of the dense layers that `names` has, over inputs of the model."
  def record(%{model: model, params: params}, names, inputs) do
    {observed, layers} = observed(model, names, self())
    if layers == [], do: raise("no dense layer of this model is a module of its files")
    {_init, predict} = Axon.build(observed)
    calibration = Calibration.new()

    for input <- inputs do
      predict.(params, input)
      # A compiler may run hooks beside the caller and after it: none is left behind here,
      # and what is wrong with an activation is raised where it ends the recording.
      for layer <- layers, do: Calibration.add!(calibration, layer, activation(layer))
    end

    calibration
  end

  # The model with a hook before each of its dense layers that has a name in the files.
  defp observed(model, names, recorder) do
    layers = for {id, layer} <- dense(model), name = names.(layer), into: %{}, do: {id, name}

    observed =
      Axon.map_nodes(model, fn
        %{id: id, hooks: hooks} = node when is_map_key(layers, id) ->
          hook = &send(recorder, {:activation, layers[id], &1})
          %{node | hooks: [{:pre_forward, :inference, hook} | hooks]}

        node ->
          node
      end)

    {observed, Map.values(layers)}
  end

  defp dense(model) do
    Axon.reduce_nodes(model, [], fn
      %{op: :dense, id: id, name: name}, found -> [{id, name.(:dense, %{})} | found]
      _node, found -> found
    end)
  end

  defp activation(layer) do
    receive do
      {:activation, ^layer, x} ->
        {kind, bits} = Nx.type(x)
        Tensor.from_binary!(Nx.to_binary(x), :"#{kind}#{bits}", Tuple.to_list(Nx.shape(x)))
    after
      60_000 -> raise "nothing came to #{layer} in a minute"
    end
  end

  @doc """
  What turns Bumblebee's name of a layer into that of the files, nil where they have none.

  Files may leave out the first part of the names that Bumblebee has, or have one more.
  """
  def names(spec, directory) do
    modules =
      for %{name: name} <- Checkpoint.open!(directory).entries,
          do: String.replace_suffix(name, ".weight", "")

    patterns =
      for {ours, sources} <- Bumblebee.HuggingFace.Transformers.Model.params_mapping(spec),
          theirs <- List.wrap(sources),
          is_binary(theirs) do
        numbers = ours |> Regex.escape() |> String.replace(~r/\\\{(\w+)\\\}/, "(?<\\1>\\d+)")
        {Regex.compile!("^#{numbers}$"), theirs}
      end

    fn layer ->
      Enum.find_value(patterns, fn {pattern, theirs} ->
        with %{} = numbers <- Regex.named_captures(pattern, layer) do
          theirs = Regex.replace(~r/\{(\w+)\}/, theirs, fn _, key -> numbers[key] end)
          nearest(modules, theirs)
        end
      end)
    end
  end

  defp nearest(modules, theirs) do
    modules
    |> Enum.filter(&(ends_with?(&1, theirs) or ends_with?(theirs, &1)))
    |> Enum.min_by(&abs(byte_size(&1) - byte_size(theirs)), fn -> nil end)
  end

  defp ends_with?(name, last), do: String.ends_with?("." <> name, "." <> last)

  @doc "Windows of the text, each with the tokens that a text begins and ends with."
  def windows(tokenizer, text, length) do
    tokenizer = Bumblebee.configure(tokenizer, length: length)

    # Pieces that are cut to a window. Shorter ones are left out: padding is nothing that
    # a layer should be quantized for.
    text
    |> Stream.unfold(&if(&1 != "", do: String.split_at(&1, 8 * length)))
    |> Stream.map(&Bumblebee.apply_tokenizer(tokenizer, &1))
    |> Stream.filter(&(Nx.to_number(Nx.all(&1["attention_mask"])) == 1))
  end
end

case System.argv() do
  [directory, text, out] -> Recorder.run(directory, text, out)
  _ -> IO.puts(:stderr, "usage: elixir bumblebee.exs MODEL_DIR TEXT OUT.safetensors")
end
