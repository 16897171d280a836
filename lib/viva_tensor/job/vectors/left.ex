defmodule VivaTensor.Job.Vectors.Left do
  @moduledoc false
  # What an earlier job left of vectors, held against those of now.

  alias VivaTensor.{Error, Native}
  alias VivaTensor.Job.{Identity, Manifest, Options, Outputs}
  alias VivaTensor.Job.Vectors.Source

  defstruct at: 0, head: [], pieces: %{}, look?: false, published: nil

  @typedoc """
  `head` is to be recorded before anything else, `at` that place; `pieces` are by their
  first vectors, and `look?` whether those have to be read to be known again; `published`
  is the report of a job that was interrupted after its output appeared.
  """
  @type t :: %__MODULE__{
          at: non_neg_integer,
          head: [Manifest.entry()],
          pieces: %{non_neg_integer => map},
          look?: boolean,
          published: map | nil
        }

  @doc "Reads the manifest of an output; refuses one whose job was another."
  @spec read(Outputs.found(), Identity.t(), Source.t(), Options.t()) ::
          {:ok, t} | {:error, Error.t()}
  def read({:nothing, _path}, identity, source, options) do
    {:ok, nothing(0, identity, source, options)}
  end

  def read({what, path}, identity, source, options) do
    with {:ok, records, at} <- Manifest.read(path) do
      case records do
        [{:begin, %{identity: was}} | records] -> held(what, records, at, was, identity)
        [] -> {:ok, nothing(at, identity, source, options)}
      end
    end
  end

  defp nothing(at, identity, source, options) do
    what = %{
      identity: identity,
      options: Options.to_keyword(options),
      tensors: Source.pieces(source),
      bytes: source.bytes
    }

    %__MODULE__{at: at, head: [{:begin, what}]}
  end

  defp held(what, records, at, was, now) do
    was = List.last([was | for({:resumed, identity} <- records, do: identity)])
    published = for {:published, report} <- records, do: report

    with {:ok, touched?} <- compare(was, now) do
      {:ok,
       %__MODULE__{
         at: at,
         head: if(was == now, do: [], else: [{:resumed, now}]),
         pieces: for({:unit, [first], _name, piece} <- records, into: %{}, do: {first, piece}),
         look?: touched? or now.files == %{},
         published: if(what == :published, do: List.last(published))
       }}
    end
  end

  defp compare(was, now) do
    with {same, _files} when is_atom(same) and same != :error <- Identity.compare(was, now),
         do: {:ok, same == :look}
  end

  @doc "The row of a piece that is there already, or that has to be written again."
  @spec look(t, reference, Source.piece(), reference) ::
          {:ok | :redo, map} | :nothing | {:error, Error.t()}
  def look(left, writer, {first, count, tensor}, cancel) do
    case left.pieces do
      %{^first => %{count: ^count} = piece} ->
        with :ok <- same_vectors(left, piece, first, tensor),
             {:ok, same?} <-
               writer
               |> Native.vectors_verify(first, count, piece.written, cancel)
               |> Error.wrap(:output) do
          {if(same?, do: :ok, else: :redo), piece.row}
        end

      %{^first => %{count: was}} ->
        {:error, changed(first + min(was, count))}

      _ ->
        :nothing
    end
  end

  defp same_vectors(%{look?: false}, _piece, _first, _tensor), do: :ok

  defp same_vectors(_left, %{written: {_bytes, hash, _sha256, _nearest}}, first, tensor) do
    case tensor.ref |> Native.vectors_source_hash() |> Error.wrap(:source) do
      {:ok, ^hash} -> :ok
      {:ok, _other} -> {:error, changed(first)}
      error -> error
    end
  end

  @doc "Fails if there was more than so many vectors."
  @spec within(t, non_neg_integer) :: :ok | {:error, Error.t()}
  def within(left, count) do
    if Enum.any?(left.pieces, fn {first, _piece} -> first >= count end),
      do: {:error, changed(count)},
      else: :ok
  end

  defp changed(vector) do
    Identity.source_changed([{"the source", "has other vectors from vector #{vector} on"}])
  end
end
