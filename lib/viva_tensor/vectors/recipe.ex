defmodule VivaTensor.Vectors.Recipe do
  @moduledoc """
  What a user asks for who has embedding vectors: codes to search in, and what the best
  of them are scored by again.

  - `:codes` - `:int8`, `:int4` or `:binary`; required
  - `:rescore` - `:f16`, `:int8` or `:none`; by default `:f16` beside int8 codes and
    `:int8` beside others
  - `:metric` - `:cosine` (default): vectors are brought to length one first; or `:dot`
  - `:center` - whether the mean of a sample is taken from every vector first (`true`).
    It adds the same to all scores of a query, so that their order stays, and more bits
    are left for what tells vectors apart
  - `:queries` - how many vectors of the set look for their ten nearest, to measure what
    searches find (200)
  - `:oversample` - how many times ten are scored again then (10)
  - `:tensor` - the name of the matrix in a file that holds several
  - `:dimension` - the length of a stream's vectors; without it, that of the first
  - `:dtype` - what a stream's vectors are made of: `:f32` (default), `:f16`, `:bf16` or
    `:f64`, little-endian
  """

  alias VivaTensor.{Error, Native}

  @dtypes [:f32, :f16, :bf16, :f64]
  @defaults [
    codes: nil,
    rescore: nil,
    metric: :cosine,
    center: true,
    queries: 200,
    oversample: 10,
    tensor: nil,
    dimension: nil,
    dtype: nil
  ]

  @enforce_keys [:codes]
  defstruct @defaults

  @type t :: %__MODULE__{
          codes: :int8 | :int4 | :binary,
          rescore: :f16 | :int8 | :none,
          metric: :cosine | :dot,
          center: boolean,
          queries: non_neg_integer,
          oversample: pos_integer,
          tensor: String.t() | nil,
          dimension: pos_integer | nil,
          dtype: :f32 | :f16 | :bf16 | :f64 | nil
        }

  @doc """
  Checks a recipe.

      iex> {:ok, recipe} = VivaTensor.Vectors.Recipe.new(codes: :binary)
      iex> recipe.rescore
      :int8
      iex> {:error, error} = VivaTensor.Vectors.Recipe.new(codes: :int3)
      iex> Exception.message(error)
      "vectors: option codes: expected int8, int4, binary, got int3"
  """
  @spec new(keyword) :: {:ok, t} | {:error, Error.t()}
  def new(opts) when is_list(opts) do
    asked = Keyword.merge(@defaults, opts)

    with :ok <- known(opts),
         :ok <- check(:codes, asked[:codes] != nil, "is required, for example codes: :int8"),
         :ok <- check(:center, is_boolean(asked[:center]), "expected true or false"),
         :ok <- check(:queries, count?(asked[:queries], 0), "expected how many, or 0"),
         :ok <- check(:oversample, count?(asked[:oversample], 1), "expected a positive integer"),
         :ok <- check(:tensor, name?(asked[:tensor]), "expected the name of a tensor"),
         :ok <- check(:dimension, dimension?(asked[:dimension]), "expected a positive integer"),
         :ok <- check(:dtype, asked[:dtype] in [nil | @dtypes], "expected f32, f16, bf16 or f64"),
         {:ok, settings} <-
           asked |> Map.new() |> settings() |> Native.vectors_settings() |> Error.wrap(:vectors) do
      {:ok, struct!(__MODULE__, Keyword.merge(asked, Map.to_list(settings)))}
    end
  end

  @doc false
  # As native code takes it.
  def settings(%{codes: codes, rescore: rescore, metric: metric, center: center}),
    do: {codes, rescore, metric, center}

  @doc "The options that give the same recipe."
  @spec to_options(t) :: keyword
  def to_options(%__MODULE__{} = recipe), do: recipe |> Map.from_struct() |> Map.to_list()

  @doc "A recipe as plain data, for `report.json`."
  @spec to_map(t) :: map
  def to_map(%__MODULE__{} = recipe), do: Map.from_struct(recipe)

  defp known(opts) do
    case opts |> Keyword.drop(Keyword.keys(@defaults)) |> Keyword.keys() do
      [] -> :ok
      [key | _] -> invalid(key, "no such option; it takes #{names()}")
    end
  end

  defp names, do: Enum.map_join(@defaults, ", ", fn {key, _} -> to_string(key) end)

  defp check(_option, true, _message), do: :ok
  defp check(option, false, message), do: invalid(option, message)

  defp count?(value, least), do: is_integer(value) and value >= least and value <= 100_000
  defp name?(value), do: value == nil or is_binary(value)
  defp dimension?(value), do: value == nil or (is_integer(value) and value > 0)

  defp invalid(option, message), do: Error.option(:vectors, to_string(option), message)
end
