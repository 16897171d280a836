defmodule VivaTensor.Plan.Model do
  @moduledoc false
  # The tensors of a model, and what its cache of keys and values depends on: from the
  # headers of a checkpoint, or from the configuration of a Llama.

  alias VivaTensor.{Checkpoint, Error, Native}

  @enforce_keys [:name, :config, :entries, :layers, :kv_heads, :head_size]
  defstruct [:name, :config, :entries, :layers, :kv_heads, :head_size]

  @type t :: %__MODULE__{
          name: String.t(),
          config: map | nil,
          entries: [VivaTensor.Recipe.entry()],
          layers: non_neg_integer,
          kv_heads: non_neg_integer,
          head_size: non_neg_integer
        }

  # Touvron et al., "LLaMA" and "Llama 2", 2023; the 70B is the second's.
  @named [
    {"llama-7b", %{hidden: 4096, ffn: 11_008, layers: 32, heads: 32, kv_heads: 32}},
    {"llama-13b", %{hidden: 5120, ffn: 13_824, layers: 40, heads: 40, kv_heads: 40}},
    {"llama-30b", %{hidden: 6656, ffn: 17_920, layers: 60, heads: 52, kv_heads: 52}},
    {"llama-70b", %{hidden: 8192, ffn: 28_672, layers: 80, heads: 64, kv_heads: 8}}
  ]

  # Architectures whose tensors are those of Llama; with biases on q, k and v or not.
  @families %{"llama" => false, "mistral" => false, "qwen2" => true}

  @spec names() :: [String.t()]
  def names, do: for({name, _} <- @named, do: name)

  @doc "Reads a checkpoint's headers or a configuration, or looks up a name."
  @spec read(Path.t()) :: {:ok, t} | {:error, Error.t()}
  def read(model) do
    case List.keyfind(@named, model, 0) do
      {name, sizes} -> from_config(name, config(sizes))
      nil -> from_path(model)
    end
  end

  defp config(sizes) do
    %{
      "model_type" => "llama",
      "hidden_size" => sizes.hidden,
      "intermediate_size" => sizes.ffn,
      "num_hidden_layers" => sizes.layers,
      "num_attention_heads" => sizes.heads,
      "num_key_value_heads" => sizes.kv_heads,
      "vocab_size" => 32_000,
      "dtype" => "bfloat16"
    }
  end

  defp from_path(path) do
    config = if File.dir?(path), do: Path.join(path, "config.json"), else: path

    cond do
      Path.basename(config) != "config.json" or weights?(Path.dirname(config)) ->
        from_checkpoint(path)

      File.regular?(config) ->
        with {:ok, text} <- File.read(config) |> file_error(config),
             {:ok, config} <- text |> Native.json_decode() |> Error.wrap(:source) do
          from_config(path, config)
        end

      true ->
        from_checkpoint(path)
    end
  end

  # A path to config.json asks for what stands there, weights beside it or not.
  defp weights?(directory) do
    Path.wildcard(Path.join(directory, "*.{safetensors,gguf}")) != []
  end

  defp file_error({:ok, text}, _path), do: {:ok, text}

  defp file_error({:error, code}, path) do
    message = "#{path}: #{:file.format_error(code)}"
    {:error, Error.new(:source, {:io, %{path: path, code: to_string(code)}}, message)}
  end

  defp from_checkpoint(path) do
    path = if Path.basename(path) == "config.json", do: Path.dirname(path), else: path

    with {:ok, checkpoint} <- Checkpoint.open(path) do
      config = checkpoint.config || %{}

      {:ok,
       %__MODULE__{
         name: path,
         config: checkpoint.config,
         entries: checkpoint.entries,
         layers: config["num_hidden_layers"] || 0,
         kv_heads: config["num_key_value_heads"] || config["num_attention_heads"] || 0,
         head_size: head_size(config) || 0
       }}
    end
  end

  defp head_size(%{"head_dim" => size}) when is_integer(size), do: size

  defp head_size(%{"hidden_size" => hidden, "num_attention_heads" => heads}),
    do: div(hidden, heads)

  defp head_size(_config), do: nil

  defp from_config(name, config) do
    sizes = ~w(hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size)
    missing = Enum.find(sizes, &(not is_integer(config[&1]) or config[&1] <= 0))
    type = config["model_type"]

    cond do
      not is_map_key(@families, type) ->
        known = @families |> Map.keys() |> Enum.join(", ")

        Error.option(
          :plan,
          "model",
          "a configuration alone says the tensors of #{known}, not of #{inspect(type)}; " <>
            "give the checkpoint, whose headers say them"
        )

      missing ->
        Error.option(:plan, "model", "#{name}: #{missing} is no positive integer")

      true ->
        {:ok, llama(name, config)}
    end
  end

  defp llama(name, config) do
    heads = config["num_attention_heads"]

    model = %__MODULE__{
      name: name,
      config: config,
      entries: [],
      layers: config["num_hidden_layers"],
      kv_heads: config["num_key_value_heads"] || heads,
      head_size: head_size(config)
    }

    %{model | entries: entries(model, heads, dtype(config))}
  end

  defp entries(model, heads, {dtype, bytes}) do
    config = model.config

    {hidden, ffn, vocab} =
      {config["hidden_size"], config["intermediate_size"], config["vocab_size"]}

    {q, kv} = {heads * model.head_size, model.kv_heads * model.head_size}
    biases? = config["attention_bias"] || @families[config["model_type"]]

    layer =
      [
        {"self_attn.q_proj.weight", [q, hidden]},
        {"self_attn.k_proj.weight", [kv, hidden]},
        {"self_attn.v_proj.weight", [kv, hidden]},
        {"self_attn.o_proj.weight", [hidden, q]},
        {"mlp.gate_proj.weight", [ffn, hidden]},
        {"mlp.up_proj.weight", [ffn, hidden]},
        {"mlp.down_proj.weight", [hidden, ffn]},
        {"input_layernorm.weight", [hidden]},
        {"post_attention_layernorm.weight", [hidden]}
      ] ++
        if biases? do
          [
            {"self_attn.q_proj.bias", [q]},
            {"self_attn.k_proj.bias", [kv]},
            {"self_attn.v_proj.bias", [kv]}
          ]
        else
          []
        end

    layers =
      for i <- 0..(model.layers - 1),
          {name, shape} <- layer,
          do: {"model.layers.#{i}.#{name}", shape}

    head = if config["tie_word_embeddings"], do: [], else: [{"lm_head.weight", [vocab, hidden]}]
    outer = [{"model.embed_tokens.weight", [vocab, hidden]}, {"model.norm.weight", [hidden]}]

    for {name, shape} <- outer ++ layers ++ head do
      %{name: name, dtype: dtype, shape: shape, nbytes: bytes * Enum.product(shape)}
    end
  end

  defp dtype(config) do
    case config["dtype"] || config["torch_dtype"] do
      "float32" -> {"f32", 4}
      "float16" -> {"f16", 2}
      _ -> {"bf16", 2}
    end
  end
end
