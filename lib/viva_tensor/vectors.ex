defmodule VivaTensor.Vectors do
  @moduledoc """
  Embedding vectors, compressed to codes, and searches in them.

  A job (`VivaTensor.Job.start/1` with `vectors:`, or `mix viva.vectors`) writes a
  directory of safetensors files, a tensor each: `codes`, the `scale` of each vector, the
  `mean` that was taken from all, and what the best are scored by again, `rescore` and
  `rescore_scale`. What they are to the bit is in `docs/vectors.md`.

      iex> vectors =
      ...>   for i <- 1..500 do
      ...>     for j <- 1..8, into: <<>>, do: <<:math.sin(i * j)::little-float-32>>
      ...>   end
      iex> to = Path.join(System.tmp_dir!(), "vectors-#{System.os_time()}")
      iex> {:ok, job} = VivaTensor.Job.start(vectors: vectors, to: to, codes: :int8)
      iex> {:ok, report} = VivaTensor.Job.await(job)
      iex> report.vectors
      500
      iex> {:ok, set} = VivaTensor.Vectors.open(to)
      iex> set
      #VivaTensor.Vectors<500 of 8, int8, f16>
      iex> {:ok, [{41, score} | _]} = VivaTensor.Vectors.search(set, Enum.at(vectors, 41), k: 3)
      iex> Float.round(score, 3)
      1.0
      iex> File.rm_rf!(to)

  Files are mapped, not read: a search takes its scores' memory, and what of the files is
  looked at can be given back by the system.
  """

  alias VivaTensor.{Error, Native, Tensor}

  @enforce_keys [:ref, :count, :dimension, :codes, :rescore, :metric, :center]
  defstruct [:ref, :count, :dimension, :codes, :rescore, :metric, :center]

  @typedoc "What the fields mean is said in `VivaTensor.Vectors.Recipe`."
  @type t :: %__MODULE__{
          ref: reference,
          count: non_neg_integer,
          dimension: pos_integer,
          codes: :int8 | :int4 | :binary,
          rescore: :f16 | :int8 | :none,
          metric: :cosine | :dot,
          center: boolean
        }

  @typedoc "The number of a vector, from 0, and its score: the higher, the nearer."
  @type found :: {non_neg_integer, float}

  @doc "Opens a directory that a job wrote."
  @spec open(Path.t()) :: {:ok, t} | {:error, Error.t()}
  def open(path) do
    with {:ok, fields} <- path |> Native.vectors_open() |> Error.wrap(:open) do
      {:ok, struct!(__MODULE__, fields)}
    end
  end

  @doc "Like `open/1`, but raises `VivaTensor.Error`."
  @spec open!(Path.t()) :: t
  def open!(path), do: Error.bang!(open(path))

  @doc """
  The vectors that are nearest to a query, the best first, or to each of several.

  A query is a binary of f32, little-endian, or a `VivaTensor.Tensor`: a vector, or a
  matrix with a row for each query, and then the result is a list for each.

  - `:k` - how many (10)
  - `:oversample` - how many times as many are scored again (10); 0 goes by codes alone.
    Then the scores of binary codes are no cosines: they only rank
  - `:hamming` - binary codes by the number of bits in which they differ from the query's,
    as databases do (`false`). Otherwise the query has sixteen steps and more is found
  """
  @spec search(t, binary | Tensor.t(), keyword) ::
          {:ok, [found] | [[found]]} | {:error, Error.t()}
  def search(%__MODULE__{} = set, query, opts \\ []) do
    with {:ok, k, oversample, hamming} <- options(opts),
         {:ok, queries, single?} <- queries(set, query),
         {:ok, lists} <-
           set.ref
           |> Native.vectors_search(queries.ref, k, k * oversample, hamming)
           |> Error.wrap(:search) do
      {:ok, if(single?, do: hd(lists), else: lists)}
    end
  end

  @doc "Like `search/3`, but raises `VivaTensor.Error`."
  @spec search!(t, binary | Tensor.t(), keyword) :: [found] | [[found]]
  def search!(set, query, opts \\ []), do: Error.bang!(search(set, query, opts))

  @doc "Lets go of the files now instead of when it is garbage collected."
  @spec release(t) :: :ok
  def release(%__MODULE__{ref: ref}), do: Native.vectors_release(ref)

  defp options(opts) do
    {taken, others} = Keyword.split(opts, [:k, :oversample, :hamming])
    taken = Keyword.merge([k: 10, oversample: 10, hamming: false], taken)

    case {taken[:k], taken[:oversample], taken[:hamming], others} do
      {_, _, _, [{unknown, _} | _]} ->
        message = "no such option; it takes k, oversample, hamming"
        Error.option(:search, to_string(unknown), message)

      {k, _, _, _} when not (is_integer(k) and k > 0) ->
        Error.option(:search, "k", "expected a positive integer, got #{inspect(k)}")

      {_, n, _, _} when not (is_integer(n) and n >= 0) ->
        Error.option(:search, "oversample", "expected an integer from 0 on, got #{inspect(n)}")

      {_, _, hamming, _} when not is_boolean(hamming) ->
        Error.option(:search, "hamming", "expected true or false, got #{inspect(hamming)}")

      {k, oversample, hamming, _} ->
        {:ok, k, oversample, hamming}
    end
  end

  defp queries(set, query) when is_binary(query) do
    with {:ok, tensor} <- Tensor.from_binary(query, :f32, [1, set.dimension]),
         do: {:ok, tensor, true}
  end

  defp queries(_set, %Tensor{shape: [n]} = query) do
    with {:ok, bytes} <- Tensor.to_binary(query),
         {:ok, tensor} <- Tensor.from_binary(bytes, query.dtype, [1, n]),
         do: {:ok, tensor, true}
  end

  defp queries(_set, %Tensor{} = query), do: {:ok, query, false}

  defp queries(_set, other) do
    Error.option(:search, "query", "expected a binary or a tensor, got #{inspect(other)}")
  end

  defimpl Inspect do
    def inspect(set, _opts) do
      "#VivaTensor.Vectors<#{set.count} of #{set.dimension}, #{set.codes}, #{set.rescore}>"
    end
  end
end
