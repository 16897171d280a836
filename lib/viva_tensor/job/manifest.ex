defmodule VivaTensor.Job.Manifest do
  @moduledoc false
  # The file in an unfinished output that says what of it is done.
  #
  # It begins with a line that names it and is only appended to. A record is a term
  # behind its length and checksum, so that one that was torn by the end of a machine,
  # and whatever follows it, is not taken for anything:
  #
  #     size :: 32, crc32 of the term :: 32, term :: size bytes
  #
  # The records, each made durable after what it speaks of:
  #
  # - `{:begin, %{identity:, options:, tensors:, bytes:}}` - what the job is to do, first
  # - `{:resumed, identity}` - with what it was gone on with
  # - `{:scales, group, %{scales:, source_hash:}}` - what was chosen for a group of weights
  # - `{:rows, shard, name, {first, last}, %{stats:, source_hash:, parts:, span:}}` - a
  #   finished range of the rows of a huge tensor
  # - `{:unit, shard, name, %{row:, source_hash:, parts:}}` - a finished tensor; `parts`
  #   are `{tensor, {start, end}, sha256, content}`, bytes of a tensor of the output, and the
  #   content of one that the shard gets only when it is finished, `nil` for others;
  #   `source_hash` is `[{{first, last}, hash}]` where ranges were finished before
  # - `{:verified, name, span}` - a unit of an earlier job was looked at, and when
  # - `{:kept, shard, name, reason}` - a weight that has to be kept after all
  # - `{:rewritten, shard, %{name => reason}}` - a shard that others replace
  # - `{:named, [{file, final}]}` - the files of shards get these names
  # - `{:published, report}` - everything is there and about to appear; the report is
  #   without its rows, which are those of the units

  alias VivaTensor.Error
  alias VivaTensor.Job.{FileError, Observation, Ranges, Span}

  @magic "viva_tensor manifest 1\n"

  @typedoc "A shard's id."
  @type shard :: [non_neg_integer]

  @type entry ::
          {:begin, map}
          | {:resumed, map}
          | {:scales, Observation.group(), Observation.chosen()}
          | {:unit, shard, String.t(), map}
          | {:rows, shard, String.t(), {non_neg_integer, pos_integer}, Ranges.part()}
          | {:verified, String.t(), Span.t()}
          | {:kept, shard, String.t(), String.t()}
          | {:rewritten, shard, %{String.t() => String.t()}}
          | {:named, [{String.t(), String.t()}]}
          | {:published, map}

  @doc """
  Records as they are appended.

      iex> alias VivaTensor.Job.Manifest
      iex> bytes = IO.iodata_to_binary([Manifest.head(), Manifest.encode([{:kept, [0], "a", "NaN"}])])
      iex> Manifest.decode(bytes)
      {:ok, [{:kept, [0], "a", "NaN"}], byte_size(bytes)}
      iex> {:ok, [], at} = Manifest.decode(binary_part(bytes, 0, byte_size(bytes) - 1))
      iex> at == byte_size(Manifest.head())
      true
      iex> {:ok, [_kept], _at} = Manifest.decode(bytes <> <<0::128>>)
      iex> Manifest.decode(<<0::1024>>)
      {:ok, [], 0}
  """
  @spec encode([tuple]) :: iodata
  def encode(records) do
    for record <- records do
      term = :erlang.term_to_binary(record)
      [<<byte_size(term)::32, :erlang.crc32(term)::32>>, term]
    end
  end

  @doc "What a manifest begins with."
  @spec head() :: binary
  def head, do: @magic

  @doc "The records of a file, and where the next one goes."
  @spec read(Path.t()) :: {:ok, [tuple], non_neg_integer} | {:error, Error.t()}
  def read(path) do
    with {:ok, found, at} <- reduce(path, [], &[&1 | &2]), do: {:ok, Enum.reverse(found), at}
  end

  @doc "Takes the records of a file one by one, and says where the next one goes."
  @spec reduce(Path.t(), acc, (tuple, acc -> acc)) ::
          {:ok, acc, non_neg_integer} | {:error, Error.t()}
        when acc: term
  def reduce(path, acc, fun) do
    with {:ok, bytes} <- path |> File.read() |> FileError.wrap(:output, path),
         :error <- reduce_bytes(bytes, acc, fun) do
      {:error,
       Error.new(
         :output,
         {:invalid_file, %{path: path, message: "is no manifest of this version"}},
         "#{path} is no manifest of this version: use --force to begin again"
       )}
    end
  end

  @doc "The same of the bytes of a file; `:error` for any other file."
  @spec decode(binary) :: {:ok, [tuple], non_neg_integer} | :error
  def decode(bytes) do
    with {:ok, found, at} <- reduce_bytes(bytes, [], &[&1 | &2]),
         do: {:ok, Enum.reverse(found), at}
  end

  defp reduce_bytes(<<@magic, rest::binary>>, acc, fun),
    do: records(rest, byte_size(@magic), acc, fun)

  # Torn before there was anything to say, or never written: then a file has zeros.
  defp reduce_bytes(<<0, _zeros::binary>>, acc, _fun), do: {:ok, acc, 0}

  defp reduce_bytes(bytes, acc, _fun) when byte_size(bytes) < byte_size(@magic),
    do: {:ok, acc, 0}

  defp reduce_bytes(_bytes, _acc, _fun), do: :error

  defp records(<<size::32, crc::32, term::binary-size(size), rest::binary>>, at, acc, fun) do
    # Nothing, and the checksum of nothing, are zeros: what a file has where it was never
    # written.
    if size > 0 and :erlang.crc32(term) == crc do
      records(rest, at + 8 + size, fun.(:erlang.binary_to_term(term), acc), fun)
    else
      {:ok, acc, at}
    end
  end

  defp records(_torn, at, acc, _fun), do: {:ok, acc, at}
end
