defmodule VivaTensor.Recipe do
  @moduledoc """
  What a user asks for: a format, how its codes are chosen, the layout on disk,
  and which tensors are quantized.

  By default the weights of linear layers are quantized: two-dimensional
  floating-point tensors named `*.weight`. These stay as they are:

  - norms, biases and everything that is not two-dimensional,
  - embeddings, the output head, and a head tied to the embedding,
  - routers of mixture-of-experts layers,
  - weights of fewer than `:min_elements` elements,
  - integers, booleans and 8-bit floats,
  - weights that the model's code in `transformers` stores transposed or insists
    on keeping,
  - weights whose rows the block size does not divide, where the layout needs that.

  `:exclude` patterns keep more. `:include` patterns quantize what the rule would
  have kept, as far as the format can. An exclude wins over an include.

  The usual ones have names, see `presets/0`; a recipe prints as what makes it again:

      iex> inspect(VivaTensor.Recipe.new!(:nf4, min_elements: 0))
      "VivaTensor.Recipe.new!(format: :nf4, layout: :bitsandbytes, double_quant: true, min_elements: 0)"
  """

  alias VivaTensor.{Calibration, Error, Native}
  alias VivaTensor.Recipe.Presets

  @own_keys [:format, :layout, :include, :exclude, :min_elements, :non_finite, :statistics]
  @float_dtypes ~w(f64 f32 f16 bf16)

  # GPT-2 and its kin keep linear weights as [in, out] ("Conv1D").
  @transposed_models ~w(gpt2 openai-gpt imagegpt decision_transformer)
  # transformers loads these projections in f32 whatever the config asks for.
  @f32_projections Map.new(~w(t5 mt5 umt5 longt5), &{&1, ["wo"]})

  @heads ~w(lm_head embed_out output_projection score classifier qa_outputs)
  @embeddings ~w(wte wpe shared relative_attention_bias token_embd)
  @routers ~w(gate router shared_expert_gate)

  @enforce_keys [:format, :layout]
  defstruct [
    :format,
    :layout,
    options: [],
    settings: %{},
    include: [],
    exclude: [],
    min_elements: 4096,
    non_finite: :error,
    calibrated: false,
    statistics: nil
  ]

  @typedoc """
  `options` are the format's options as they were given, `settings` the same
  with every choice made; `calibrated` says whether the method looks at activations.
  """
  @type t :: %__MODULE__{
          format: atom,
          layout: atom,
          options: keyword,
          settings: map,
          include: [Regex.t()],
          exclude: [Regex.t()],
          min_elements: non_neg_integer,
          non_finite: :error | :keep,
          calibrated: boolean,
          statistics: Path.t() | Calibration.t() | nil
        }

  @typedoc "What a recipe looks at in a tensor."
  @type entry :: %{
          required(:name) => String.t(),
          required(:dtype) => String.t(),
          required(:shape) => [non_neg_integer],
          optional(any) => any
        }

  @type decision :: :quantize | {:keep, reason :: String.t()}

  @doc """
  Checks and completes a recipe: options, or the name of a preset and options that go
  before its own.

  - `:format` - see `VivaTensor.formats/0`; required
  - `:layout` - how it is spelled on disk; by default the format's usual layout
  - `:include`, `:exclude` - a regular expression for tensor names, or a list of
    them, as strings or as `Regex`
  - `:min_elements` - smaller weights are kept (4096)
  - `:non_finite` - what to do about NaN and infinities in a weight: `:error`
    puts it aside and the job ends as partial, `:keep` leaves it unquantized (`:error`)
  - `:statistics` - what the layers of the model meet, for methods that look at it:
    a `VivaTensor.Calibration` with an entry for each layer, or the file of one. A
    recipe may do without, a job may not.

  Every other option belongs to the format: `:method`, `:block_size`,
  `:double_quant` and so on, as for `VivaTensor.quantize/3`.

      iex> {:ok, recipe} = VivaTensor.Recipe.new(:awq)
      iex> {recipe.format, recipe.layout, recipe.settings.method}
      {:int4, :awq, :awq}
      iex> {:error, error} = VivaTensor.Recipe.new(format: :nf4, block_size: 63)
      iex> error.reason |> elem(1) |> Map.fetch!(:option)
      "block_size"
  """
  @spec new(atom | keyword, keyword) :: {:ok, t} | {:error, Error.t()}
  def new(preset_or_options, options \\ [])

  def new(preset, opts) when is_atom(preset) and is_list(opts) do
    case Presets.fetch(preset) do
      {:ok, options} -> options |> beside(opts) |> Keyword.merge(opts) |> new()
      :error -> unknown(preset)
    end
  end

  def new(opts, []) when is_list(opts) do
    {own, options} = Keyword.split(opts, @own_keys)

    with {:ok, format} <- fetch_format(own),
         {:ok, include} <- patterns(own, :include),
         {:ok, exclude} <- patterns(own, :exclude),
         {:ok, min_elements} <- min_elements(Keyword.get(own, :min_elements, 4096)),
         {:ok, non_finite} <- non_finite(Keyword.get(own, :non_finite, :error)),
         {:ok, spec} <- native_spec(format, options, Keyword.get(own, :layout)) do
      with_statistics(
        %__MODULE__{
          format: spec.format,
          layout: spec.layout,
          options: options,
          settings: spec.options,
          include: include,
          exclude: exclude,
          min_elements: min_elements,
          non_finite: non_finite,
          calibrated: spec.calibrated
        },
        Keyword.get(own, :statistics)
      )
    end
  end

  @doc "Like `new/2`, but raises `VivaTensor.Error`."
  @spec new!(atom | keyword, keyword) :: t
  def new!(preset_or_options, options \\ []), do: Error.bang!(new(preset_or_options, options))

  @doc """
  The recipes that have a name, with a line and the options that each stands for.

      iex> Enum.find(VivaTensor.Recipe.presets(), &(&1.name == :nf4)).options
      [format: :nf4, double_quant: true]
  """
  @spec presets() :: [%{name: atom, about: String.t(), options: keyword}]
  def presets, do: Presets.all()

  @doc "The recipe with other `:statistics`."
  @spec with_statistics(t, Path.t() | Calibration.t() | nil) :: {:ok, t} | {:error, Error.t()}
  def with_statistics(recipe, nil), do: {:ok, %{recipe | statistics: nil}}

  def with_statistics(%{calibrated: false} = recipe, _statistics) do
    invalid(
      :statistics,
      "method #{recipe.settings.method} looks at no activations; leave statistics out, " <>
        "or choose a method such as :awq"
    )
  end

  def with_statistics(recipe, statistics) when is_binary(statistics) and statistics != "" do
    {:ok, %{recipe | statistics: statistics}}
  end

  def with_statistics(recipe, %Calibration{} = statistics) do
    {:ok, %{recipe | statistics: statistics}}
  end

  def with_statistics(_recipe, other) do
    invalid(
      :statistics,
      "expected a VivaTensor.Calibration or the path of a saved one, got #{inspect(other)}"
    )
  end

  @doc false
  # The native form of a recipe's format, options and layout.
  @spec spec(t) :: {:ok, reference} | {:error, Error.t()}
  def spec(%__MODULE__{} = recipe) do
    with {:ok, spec} <- native_spec(recipe.format, recipe.options, recipe.layout) do
      {:ok, spec.ref}
    end
  end

  @doc """
  Whether a tensor is quantized, or kept and why. `config` is the decoded
  `config.json` of the model, or `nil`.
  """
  @spec decide(t, entry, map | nil) :: decision
  def decide(%__MODULE__{} = recipe, entry, config \\ nil) do
    cond do
      pattern = matching(recipe.exclude, entry.name) ->
        {:keep, "excluded by /#{pattern.source}/"}

      reason = impossible(entry) ->
        {:keep, reason}

      matching(recipe.include, entry.name) ->
        :quantize

      reason = kept_by_rule(recipe, entry, config || %{}) ->
        {:keep, reason}

      true ->
        :quantize
    end
  end

  @doc false
  # The modules whose linear weight was kept, out of `{entry, decision}` pairs.
  #
  # `transformers` has to be told of them, or else it expects their weights to be
  # quantized. `lm_head` is always among them: where it is tied, no tensor in the
  # file speaks for it.
  @spec kept_modules([{entry, decision}]) :: [String.t()]
  def kept_modules(decided) do
    kept =
      for {%{shape: [_, _]} = entry, {:keep, _}} <- decided,
          weight?(entry.name),
          {module, last} = module(entry.name),
          not embedding?(last),
          do: module

    Enum.uniq(kept ++ ["lm_head"])
  end

  @doc """
  The modules among those of named tensors that are embeddings or output heads.

      iex> VivaTensor.Recipe.outer_modules(["model.embed_tokens.weight", "blk.0.attn_q.weight"])
      ["model.embed_tokens"]
  """
  @spec outer_modules([String.t()]) :: [String.t()]
  def outer_modules(names) do
    modules = Enum.map(names, &module/1)
    for({module, last} <- modules, embedding?(last) or head?(module), do: module) |> Enum.uniq()
  end

  @doc "A recipe as plain data, for `report.json`."
  @spec to_map(t) :: map
  def to_map(%__MODULE__{} = recipe) do
    %{
      format: recipe.format,
      layout: recipe.layout,
      settings: recipe.settings,
      include: Enum.map(recipe.include, & &1.source),
      exclude: Enum.map(recipe.exclude, & &1.source),
      min_elements: recipe.min_elements,
      non_finite: recipe.non_finite,
      statistics: statistics(recipe.statistics)
    }
  end

  @doc """
  The options that make the recipe again, as plain data. Statistics that are in memory
  are not among them.

      iex> recipe = VivaTensor.Recipe.new!(:nf4, exclude: ~r/head/i)
      iex> VivaTensor.Recipe.new!(VivaTensor.Recipe.to_options(recipe)).settings == recipe.settings
      true
  """
  @spec to_options(t) :: keyword
  def to_options(%__MODULE__{} = recipe) do
    patterns =
      for key <- [:include, :exclude] do
        {key, for(regex <- Map.fetch!(recipe, key), do: {regex.source, Regex.opts(regex)})}
      end

    statistics = if is_binary(recipe.statistics), do: Path.expand(recipe.statistics)

    [format: recipe.format, layout: recipe.layout, min_elements: recipe.min_elements] ++
      [non_finite: recipe.non_finite, statistics: statistics] ++ patterns ++ recipe.options
  end

  defp statistics(%Calibration{}), do: "in memory"
  defp statistics(path), do: path

  # How a preset's method chooses scales is nothing to another method.
  defp beside(options, opts) do
    if opts[:method], do: Keyword.delete(options, :scales), else: options
  end

  defp fetch_format(own) do
    case Keyword.get(own, :format) do
      nil -> invalid(:format, "is required, for example format: :nf4, or recipe: :nf4")
      format when is_atom(format) -> {:ok, format}
      other -> invalid(:format, "expected an atom such as :nf4, got #{inspect(other)}")
    end
  end

  defp patterns(own, key) do
    own
    |> Keyword.get(key, [])
    |> List.wrap()
    |> Enum.reduce_while({:ok, []}, fn pattern, {:ok, done} ->
      case pattern(pattern) do
        {:ok, regex} -> {:cont, {:ok, [regex | done]}}
        {:error, message} -> {:halt, invalid(key, message)}
      end
    end)
    |> case do
      {:ok, patterns} -> {:ok, Enum.reverse(patterns)}
      error -> error
    end
  end

  defp pattern(%Regex{} = regex), do: {:ok, regex}

  defp pattern(source) when is_binary(source), do: pattern({source, []})

  defp pattern({source, opts}) when is_binary(source) do
    with {:error, {reason, at}} <- Regex.compile(source, opts) do
      {:error, "#{inspect(source)} is no regular expression: #{reason} at position #{at}"}
    end
  end

  defp pattern(other), do: {:error, "expected a regular expression, got #{inspect(other)}"}

  defp min_elements(n) when is_integer(n) and n >= 0, do: {:ok, n}

  defp min_elements(n),
    do: invalid(:min_elements, "expected a count of elements, got #{inspect(n)}")

  defp non_finite(policy) when policy in [:error, :keep], do: {:ok, policy}

  defp non_finite(policy),
    do: invalid(:non_finite, "expected :error or :keep, got #{inspect(policy)}")

  defp native_spec(format, options, layout) do
    format |> Native.spec_new(options, layout) |> Error.wrap(:recipe)
  end

  defp unknown(name) do
    known = Presets.names()

    {:error,
     Error.new(
       :recipe,
       {:unknown_recipe, %{name: to_string(name), known: known}},
       "unknown recipe #{inspect(name)}; choose one of #{known}"
     )}
  end

  defp invalid(option, message), do: Error.option(:recipe, to_string(option), message)

  defp matching(patterns, name), do: Enum.find(patterns, &Regex.match?(&1, name))

  # What no pattern can override: no format here stores these.
  defp impossible(%{dtype: dtype}) when dtype not in @float_dtypes, do: "#{dtype} values"

  defp impossible(%{shape: shape} = entry) do
    cond do
      0 in shape -> "no elements"
      length(shape) == 2 -> nil
      entry.name |> module() |> elem(1) |> norm?() -> "norm"
      String.ends_with?(entry.name, "bias") -> "bias"
      true -> "#{length(shape)} dimensions"
    end
  end

  defp kept_by_rule(recipe, %{name: name, shape: [rows, columns]}, config) do
    {module, last} = module(name)
    model_type = config["model_type"]

    cond do
      not weight?(name) ->
        "not a linear weight"

      norm?(last) ->
        "norm"

      embedding?(last) ->
        "embedding"

      head?(module) and config["tie_word_embeddings"] == true ->
        "output head, tied to the embedding"

      head?(module) ->
        "output head"

      last in @routers ->
        "router"

      model_type in @transposed_models ->
        "stored transposed by #{model_type}"

      last in Map.get(@f32_projections, model_type, []) ->
        "kept in f32 by #{model_type}"

      rows * columns < recipe.min_elements ->
        "only #{rows * columns} elements"

      true ->
        nil
    end
  end

  defp weight?(name), do: name == "weight" or String.ends_with?(name, ".weight")

  defp embedding?(last), do: last in @embeddings or String.contains?(last, "embed")

  # "output" and "decoder" name inner layers too, so they count only where they
  # are the head: at the top of the original Llama files, and in BERT's `cls`.
  defp head?(module) do
    module == "output" or String.ends_with?(module, "predictions.decoder") or
      List.last(String.split(module, ".")) in @heads
  end

  defp norm?(last) do
    last = String.downcase(last)
    String.contains?(last, "norm") or String.starts_with?(last, "ln")
  end

  # "model.layers.0.mlp.up_proj.weight" -> {"model.layers.0.mlp.up_proj", "up_proj"}
  defp module(name) do
    case name |> String.split(".") |> Enum.reverse() do
      [only] -> {only, only}
      [_parameter, last | parts] -> {Enum.join(Enum.reverse([last | parts]), "."), last}
    end
  end

  defimpl Inspect do
    import Inspect.Algebra

    def inspect(recipe, opts) do
      own =
        for {key, default} <- [include: [], exclude: [], min_elements: 4096, non_finite: :error],
            value = Map.fetch!(recipe, key),
            value != default,
            do: {key, value}

      statistics = if recipe.statistics, do: [statistics: recipe.statistics], else: []

      fields =
        [format: recipe.format, layout: recipe.layout] ++ recipe.options ++ own ++ statistics

      fields = for {key, value} <- fields, do: concat("#{key}: ", to_doc(value, opts))
      concat(["VivaTensor.Recipe.new!("] ++ Enum.intersperse(fields, ", ") ++ [")"])
    end
  end
end
