defmodule VivaTensor.Job.Ledger do
  @moduledoc false
  # What a job has yet to record in its manifest, and what is on its way there.
  #
  # Syncing takes as long for many records as for one, so one write is under way at a
  # time and takes along everything that was added during the one before.

  alias VivaTensor.{Error, Native}
  alias VivaTensor.Job.{Manifest, Shard, Workers}

  defstruct at: 0, head: [], pending: [], shards: %{}, unrecorded: {0, 0}, writing: nil

  @typedoc """
  `head` comes before the first unit: a job that has finished none leaves no manifest.
  """
  @type t :: %__MODULE__{
          at: non_neg_integer,
          head: [Manifest.entry()],
          pending: [Manifest.entry()],
          shards: %{reference => true},
          unrecorded: {non_neg_integer, non_neg_integer},
          writing: nil | {[Manifest.entry()], [reference], binary}
        }

  @doc "A ledger whose next record goes to `at`, after those of `head`."
  @spec new([Manifest.entry()], non_neg_integer) :: t
  def new(head, at \\ 0), do: %__MODULE__{head: head, at: at}

  @doc "Adds a record, and the shard to sync before."
  @spec add(t, Manifest.entry(), Shard.t() | nil) :: t
  def add(ledger, record, shard \\ nil)

  def add(ledger, record, nil) do
    {pending, written} = ledger.unrecorded
    unrecorded = {pending + bytes(record), written}
    %{ledger | pending: [record | ledger.pending], unrecorded: unrecorded}
  end

  def add(ledger, record, %Shard{ref: ref}) do
    %{add(ledger, record) | shards: Map.put(ledger.shards, ref, true)}
  end

  # Its ranges are recorded, or about to be.
  defp bytes({:unit, _shard, _name, %{row: %{ranges: _}}}), do: 0
  defp bytes({:unit, _shard, _name, %{row: row}}), do: row.input_bytes
  defp bytes({:rows, _shard, _name, _rows, part}), do: part.stats.input_bytes
  defp bytes(_record), do: 0

  @doc "Whether everything that was added is recorded."
  @spec idle?(t) :: boolean
  def idle?(ledger), do: ledger.pending == [] and ledger.writing == nil

  @doc "Bytes of the source whose units are done and not recorded."
  @spec unrecorded(t) :: non_neg_integer
  def unrecorded(%{unrecorded: {pending, written}}), do: pending + written

  @typedoc "Shards to sync, where the bytes go, and the bytes."
  @type write :: {[reference], non_neg_integer, binary}

  @doc "Starts the next write, or nothing."
  @spec next(t) :: {write, t} | :nothing
  def next(%{writing: nil, pending: [_ | _]} = ledger) do
    records = Enum.reverse(ledger.pending)
    magic = if ledger.at == 0, do: Manifest.head(), else: ""
    bytes = IO.iodata_to_binary([magic, Manifest.encode(ledger.head ++ records)])
    writing = {records, Map.keys(ledger.shards), bytes}
    {pending, 0} = ledger.unrecorded
    ledger = %{ledger | pending: [], shards: %{}, unrecorded: {0, pending}, writing: writing}
    {again(ledger), ledger}
  end

  def next(_ledger), do: :nothing

  @doc "The write that is under way: doing it once more does no harm."
  @spec again(t) :: write
  def again(%{writing: {_records, shards, bytes}, at: at}), do: {shards, at, bytes}

  @doc "Begins a write to the manifest of an output, in a process of its own: what its messages are known by."
  @spec begin(write, reference) :: reference
  def begin({shards, at, bytes}, output) do
    write = fn -> output |> Native.output_record(shards, at, bytes) |> Error.wrap(:output) end
    Task.Supervisor.async_nolink(Workers, write).ref
  end

  @doc "Ends a write: the records that are in the manifest now."
  @spec written(t) :: {[Manifest.entry()], t}
  def written(%{writing: {records, _shards, bytes}} = ledger) do
    {pending, _written} = ledger.unrecorded
    ledger = %{ledger | at: ledger.at + byte_size(bytes), head: [], unrecorded: {pending, 0}}
    {records, %{ledger | writing: nil}}
  end
end
