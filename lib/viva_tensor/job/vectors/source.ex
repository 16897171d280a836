defmodule VivaTensor.Job.Vectors.Source do
  @moduledoc false
  # Where vectors come from, piece by piece: the rows of a matrix in a file, or a stream.
  #
  # Pieces are cut by the vectors' dimension alone, so that a job that goes on with another
  # meets the same ones.

  alias VivaTensor.{Error, Native, Tensor}
  alias VivaTensor.Job.Options

  # Elements of a piece, and of the sample that means and queries are taken from.
  @elements 4 * 1024 * 1024

  @enforce_keys [:vectors, :dimension, :dtype]
  defstruct [:vectors, :dimension, :dtype, :count, :matrix, files: [], bytes: 0]

  @typedoc "`count`, `bytes` and `files` are those of a file; a stream has none."
  @type t :: %__MODULE__{
          vectors: Enumerable.t() | nil,
          dimension: pos_integer | nil,
          dtype: atom,
          count: non_neg_integer | nil,
          matrix: reference | nil,
          files: [Path.t()],
          bytes: non_neg_integer
        }

  @typedoc "The number of its first vector, how many there are, and the vectors."
  @type piece :: {non_neg_integer, pos_integer, Tensor.t()}

  @doc "Opens the source of a job."
  @spec open(Options.t()) :: {:ok, t} | {:error, Error.t()}
  def open(%Options{source: nil, vectors: vectors, recipe: recipe}) do
    {:ok, %__MODULE__{vectors: vectors, dimension: recipe.dimension, dtype: recipe.dtype || :f32}}
  end

  def open(%Options{source: path, recipe: recipe}) do
    with {:ok, matrix} <- path |> Native.matrix_open(recipe.tensor) |> Error.wrap(:source),
         :ok <- expected(:dimension, recipe.dimension, matrix.dimension),
         :ok <- expected(:dtype, recipe.dtype, matrix.dtype) do
      {:ok,
       %__MODULE__{
         vectors: nil,
         matrix: matrix.ref,
         dimension: matrix.dimension,
         dtype: matrix.dtype,
         count: matrix.rows,
         bytes: matrix.bytes,
         files: [matrix.file]
       }}
    end
  end

  defp expected(_option, nil, _found), do: :ok
  defp expected(_option, same, same), do: :ok

  defp expected(option, asked, found) do
    Error.option(:source, to_string(option), "the matrix has #{found}, and #{asked} is asked for")
  end

  @doc "Bytes of a vector."
  @spec vector_bytes(t) :: pos_integer
  def vector_bytes(%__MODULE__{matrix: nil} = source), do: source.dimension * size(source.dtype)
  def vector_bytes(source), do: div(source.bytes, source.count)

  @doc "Vectors of a piece."
  @spec each(t) :: pos_integer
  def each(%__MODULE__{dimension: dimension}), do: max(1, div(@elements, dimension))

  @doc "How many pieces a file has."
  @spec pieces(t) :: non_neg_integer
  def pieces(%__MODULE__{count: nil}), do: 0
  def pieces(source), do: div(source.count + each(source) - 1, each(source))

  @doc "Vectors that stand for all, and their numbers: from all over a file, the first of a stream."
  @spec sample(t, piece) :: {:ok, {reference, [non_neg_integer]}} | {:error, Error.t()}
  def sample(%__MODULE__{matrix: nil}, {first, count, tensor}) do
    {:ok, {tensor.ref, Enum.to_list(first..(first + count - 1))}}
  end

  def sample(source, _piece) do
    with {:ok, {tensor, ids}} <-
           source.matrix |> Native.matrix_sample(each(source)) |> Error.wrap(:source),
         do: {:ok, {tensor.ref, ids}}
  end

  @doc """
  Calls `fun` with the source, each piece and what it returned for the one before, until
  it returns something else than that. The source of a stream knows its dimension only here.
  """
  @spec reduce(t, acc, (t, piece, acc -> {:ok, acc} | ended)) :: {:ok, t, acc} | ended
        when acc: term, ended: term
  def reduce(%__MODULE__{matrix: nil} = source, acc, fun) do
    state = %{source: source, first: 0, count: 0, rows: [], acc: acc}

    with %{} = state <- Enum.reduce_while(source.vectors, state, &add(&1, &2, fun)),
         %{} = state <- flush(state, fun) do
      {:ok, %{state.source | count: state.first}, state.acc}
    end
  end

  def reduce(source, acc, fun) do
    each = each(source)
    firsts = Stream.map(0..(pieces(source) - 1)//1, &(&1 * each))

    Enum.reduce_while(firsts, {:ok, source, acc}, fn first, {:ok, source, acc} ->
      count = min(each, source.count - first)

      with {:ok, rows} <-
             source.matrix |> Native.matrix_rows(first, count) |> Tensor.wrap(:source),
           {:ok, acc} <- fun.(source, {first, count, rows}, acc) do
        Native.matrix_give_back(source.matrix, first, count)
        {:cont, {:ok, source, acc}}
      else
        ended -> {:halt, ended}
      end
    end)
  end

  # Streams

  defp add(vector, state, fun) do
    index = state.first + state.count

    with {:ok, source} <- check(vector, index, state.source) do
      state = %{state | source: source, count: state.count + 1, rows: [state.rows, vector]}

      if state.count < each(source) do
        {:cont, state}
      else
        case flush(state, fun) do
          %{acc: _} = state -> {:cont, state}
          ended -> {:halt, ended}
        end
      end
    else
      ended -> {:halt, ended}
    end
  end

  defp flush(%{count: 0} = state, _fun), do: state

  defp flush(%{source: source, first: first, count: count} = state, fun) do
    binary = IO.iodata_to_binary(state.rows)

    with {:ok, tensor} <- Tensor.from_binary(binary, source.dtype, [count, source.dimension]),
         {:ok, acc} <- fun.(source, {first, count, tensor}, state.acc) do
      # Not when this process happens to collect its garbage.
      Tensor.release(tensor)
      %{state | first: first + count, count: 0, rows: [], acc: acc}
    end
  end

  defp check(vector, index, %{dimension: nil} = source) when is_binary(vector) do
    size = size(source.dtype)

    case byte_size(vector) do
      bytes when bytes > 0 and rem(bytes, size) == 0 ->
        {:ok, %{source | dimension: div(bytes, size)}}

      bytes ->
        invalid(index, "has #{bytes} bytes, and elements of #{source.dtype} have #{size} each")
    end
  end

  defp check(vector, index, source) when is_binary(vector) do
    expected = source.dimension * size(source.dtype)

    if byte_size(vector) == expected do
      {:ok, source}
    else
      message =
        "has #{byte_size(vector)} bytes where #{source.dimension} elements of #{source.dtype} " <>
          "have #{expected}"

      invalid(index, message)
    end
  end

  defp check(other, index, _source) do
    invalid(index, "is no binary: #{inspect(other, limit: 5, printable_limit: 50)}")
  end

  defp size(:f64), do: 8
  defp size(:f32), do: 4
  defp size(_half), do: 2

  defp invalid(index, message) do
    reason = {:invalid_vector, %{vector: index, message: message}}
    {:error, Error.new(:source, reason, "vector #{index} #{message}")}
  end
end
