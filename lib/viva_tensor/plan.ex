defmodule VivaTensor.Plan do
  @moduledoc """
  What a model would take in memory, before anything is quantized or downloaded.

      iex> {:ok, plan} = VivaTensor.Plan.estimate("llama-7b", budget: "24GB", context: 4096)
      iex> plan.parameters
      6_738_415_616
      iex> [float | _] = plan.rows
      iex> {float.name, float.weight_bytes, float.fits}
      {"bf16", 13_476_831_232, true}

  Weights are counted tensor by tensor, as a job would write them: codes, scales, zero
  points, and every tensor that its recipe keeps. The cache of keys and values is counted
  in 16 bits: 2 · layers · key-value heads · head size · 2 bytes for each position.
  What a program needs besides, activations and its own buffers, is not in it.
  """

  alias VivaTensor.{Error, Native, Recipe, Size}
  alias VivaTensor.Plan.Model

  @formats [
    {"int8", [format: :int8]},
    {"fp8_e4m3", [format: :fp8_e4m3]},
    {"q8_0", [format: :q8_0]},
    {"nf4, double-quantized", [format: :nf4, double_quant: true]},
    {"int4, groups of 128", [format: :int4]},
    {"nvfp4", [format: :nvfp4]},
    {"q4_k", [format: :q4_k]},
    {"int3, groups of 128", [format: :int3]}
  ]

  @enforce_keys [:model, :parameters, :context, :batch, :cache_bytes, :budget, :rows]
  defstruct [:model, :parameters, :context, :batch, :cache_bytes, :budget, :rows]

  @typedoc """
  One way to hold the model. `bits_per_weight` is that of the quantized weights alone;
  `fits` and `spare_bytes` (negative where it does not fit) are `nil` without a budget.
  """
  @type row :: %{
          name: String.t(),
          layout: atom | nil,
          weight_bytes: non_neg_integer,
          kept_bytes: non_neg_integer,
          bits_per_weight: float,
          total_bytes: non_neg_integer,
          fits: boolean | nil,
          spare_bytes: integer | nil
        }

  @type t :: %__MODULE__{
          model: String.t(),
          parameters: non_neg_integer,
          context: pos_integer,
          batch: pos_integer,
          cache_bytes: non_neg_integer,
          budget: pos_integer | nil,
          rows: [row]
        }

  @doc """
  Estimates a model: a checkpoint or its directory (headers alone are read), a
  `config.json` of the Llama family, or one of the names in `models/0`.

  Options:

    * `context:` - positions in the cache of keys and values (4096)
    * `batch:` - sequences that are decoded at once (1)
    * `budget:` - memory there is, as `"24GB"` or bytes
    * `formats:` - recipes to compare, as options of `VivaTensor.Recipe.new/1`, instead
      of the usual ones

  ## Errors

  `:io`, `:invalid_file`, `:invalid_option` when a config is of another architecture:
  give the checkpoint itself then.
  """
  @spec estimate(Path.t(), keyword) :: {:ok, t} | {:error, Error.t()}
  def estimate(model, options \\ []) do
    with {:ok, options} <- options(options),
         {:ok, model} <- Model.read(model),
         {:ok, recipes} <- recipes(options.formats) do
      cache = cache_bytes(model, options)
      rows = [as_is(model) | Enum.map(recipes, &row(&1, model))]

      {:ok,
       %__MODULE__{
         model: model.name,
         parameters: sum(model.entries, &elements/1),
         context: options.context,
         batch: options.batch,
         cache_bytes: cache,
         budget: options.budget,
         rows: Enum.map(rows, &against(&1, cache, options.budget))
       }}
    end
  end

  @doc "Like `estimate/2`, but raises `VivaTensor.Error`."
  @spec estimate!(Path.t(), keyword) :: t
  def estimate!(model, options \\ []), do: Error.bang!(estimate(model, options))

  @doc """
  The models that are known by name.

      iex> VivaTensor.Plan.models()
      ["llama-7b", "llama-13b", "llama-30b", "llama-70b"]
  """
  @spec models() :: [String.t()]
  defdelegate models, to: Model, as: :names

  defp options(options) do
    defaults = %{context: 4096, batch: 1, budget: nil, formats: nil}

    Enum.reduce_while(options, {:ok, defaults}, fn
      {key, n}, {:ok, all} when key in [:context, :batch] and is_integer(n) and n > 0 ->
        {:cont, {:ok, Map.put(all, key, n)}}

      {key, n}, _ when key in [:context, :batch] ->
        {:halt, Error.option(:plan, "#{key}", "expected a positive integer, got #{inspect(n)}")}

      {:budget, nil}, all ->
        {:cont, all}

      {:budget, size}, {:ok, all} ->
        case Size.parse(size) do
          {:ok, bytes} -> {:cont, {:ok, %{all | budget: bytes}}}
          {:error, message} -> {:halt, Error.option(:plan, "budget", message)}
        end

      {:formats, formats}, {:ok, all} when is_list(formats) ->
        {:cont, {:ok, %{all | formats: for(f <- formats, do: {label(f), f})}}}

      {key, _}, _ ->
        known = "context, batch, budget, formats"
        {:halt, Error.option(:plan, "#{key}", "no such option; it takes #{known}")}
    end)
  end

  defp label(options) do
    {format, rest} = Keyword.pop(options, :format)
    Enum.join([format | for({k, v} <- rest, do: "#{k} #{v}")], ", ")
  end

  defp recipes(formats) do
    Enum.reduce_while(formats || @formats, {:ok, []}, fn {label, options}, {:ok, done} ->
      with {:ok, recipe} <- Recipe.new(options), {:ok, spec} <- Recipe.spec(recipe) do
        {:cont, {:ok, [{label, recipe, spec} | done]}}
      else
        error -> {:halt, error}
      end
    end)
    |> case do
      {:ok, recipes} -> {:ok, Enum.reverse(recipes)}
      error -> error
    end
  end

  defp cache_bytes(model, options) do
    2 * model.layers * model.kv_heads * model.head_size * 2 * options.context * options.batch
  end

  defp as_is(model) do
    dtypes = model.entries |> Enum.map(& &1.dtype) |> Enum.uniq() |> Enum.join(", ")
    bytes = sum(model.entries, & &1.nbytes)
    bits = bytes * 8 / max(sum(model.entries, &elements/1), 1)
    %{name: dtypes, layout: nil, weight_bytes: bytes, kept_bytes: bytes, bits_per_weight: bits}
  end

  defp row({label, recipe, spec}, model) do
    tensors = for entry <- model.entries, do: tensor(entry, recipe, spec, model.config)
    quantized = for {:quantized, bytes, elements} <- tensors, do: {bytes, elements}
    kept = for {:kept, bytes} <- tensors, do: bytes
    bytes = sum(quantized, &elem(&1, 0))

    %{
      name: label,
      layout: recipe.layout,
      weight_bytes: bytes + Enum.sum(kept),
      kept_bytes: Enum.sum(kept),
      bits_per_weight: bytes * 8 / max(sum(quantized, &elem(&1, 1)), 1)
    }
  end

  defp tensor(entry, recipe, spec, config) do
    with :quantize <- Recipe.decide(recipe, entry, config),
         {:ok, %{bytes: bytes}} <-
           Native.plan_tensor(spec, entry.name, entry.shape, entry.dtype) do
      {:quantized, bytes, elements(entry)}
    else
      _ -> {:kept, kept_bytes(entry, recipe.layout)}
    end
  end

  # llama.cpp computes norms and biases in f32 alone.
  defp kept_bytes(%{shape: [n], dtype: dtype}, :gguf) when dtype in ~w(bf16 f16 f32), do: 4 * n
  defp kept_bytes(entry, _layout), do: entry.nbytes

  defp against(row, cache, budget) do
    total = row.weight_bytes + cache

    Map.merge(row, %{
      total_bytes: total,
      fits: budget && total <= budget,
      spare_bytes: budget && budget - total
    })
  end

  defp elements(%{shape: shape}), do: Enum.product(shape)
  defp sum(list, fun), do: list |> Enum.map(fun) |> Enum.sum()
end
