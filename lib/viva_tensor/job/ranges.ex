defmodule VivaTensor.Job.Ranges do
  @moduledoc """
  Huge tensors, of whose rows a unit does a range: what is done of each, until all is.
  """

  alias VivaTensor.Job.{Span, Step, Unit}
  alias VivaTensor.{Native, Report}

  @typedoc "What came of a range, and its span in the time line."
  @type part :: %{stats: map, source_hash: binary, parts: [tuple], span: Span.t()}

  @typedoc """
  The ranges of tensors, by the ids of their units. A tensor is closed when it is put aside
  or has to be kept: what is still done of it no longer counts.
  """
  @type t :: %{non_neg_integer => :closed | %{{non_neg_integer, pos_integer} => part}}

  @doc "What came of a unit, as it is recorded of a range."
  @spec part(Unit.done(), Span.t()) :: part
  def part({stats, source_hash, parts}, span),
    do: %{stats: stats, source_hash: source_hash, parts: parts, span: span}

  @doc "A range more. What came of the whole tensor if it was the last one, and when each was done."
  @spec add(t, Unit.t(), part) :: {{Unit.done(), [map]} | nil, t}
  def add(ranges, unit, part) do
    done = ranges |> Map.get(unit.id, %{}) |> Map.put(unit.rows, part)

    if Enum.sum(for {{first, last}, _} <- done, do: last - first) == hd(unit.shape),
      do: {whole(done), Map.delete(ranges, unit.id)},
      else: {nil, Map.put(ranges, unit.id, done)}
  end

  defp whole(done) do
    done = Enum.sort(done)
    {:ok, metrics} = Native.sums_metrics(for {_, part} <- done, do: part.stats.sums)

    counts =
      for key <- [:input_bytes, :output_bytes, :elements],
          into: %{},
          do: {key, Enum.sum(for {_, part} <- done, do: part.stats[key])}

    hashes = for {rows, part} <- done, do: {rows, part.source_hash}
    parts = for {_, part} <- done, written <- part.parts, do: written
    spans = for {{first, last}, part} <- done, do: Map.put(part.span, :rows, [first, last])
    {{Map.merge(metrics, counts), hashes, parts}, spans}
  end

  @doc "The row of such a tensor with its spans."
  @spec put(Report.row(), [map]) :: Report.row()
  def put(row, spans) do
    Map.merge(row, %{ranges: spans, began: spans |> Enum.map(& &1.began) |> Enum.min()})
  end

  @doc "Closes the tensor of a unit that does a range: the steps of others leave the queue."
  @spec close(job, Unit.t()) :: job when job: map
  def close(job, %{rows: nil}), do: job

  def close(job, %{id: id}) do
    of_it? = &match?(%{work: {:unit, %{id: ^id, rows: {_, _}}, _}}, &1)
    ranges = Map.put(job.ranges, id, :closed)
    %{job | ranges: ranges, queue: Enum.reject(job.queue, of_it?)}
  end

  @doc "Whether a step does a range of a tensor that is closed."
  @spec closed?(t, Step.t()) :: boolean
  def closed?(ranges, %{work: work}) when is_tuple(work) and elem(work, 0) in [:unit, :recall],
    do: elem(work, 1).rows != nil and ranges[elem(work, 1).id] == :closed

  def closed?(_ranges, _step), do: false

  @doc "The hashes of what a recorded unit was made from, each with its rows."
  @spec source_hashes(binary | [{tuple, binary}]) :: [{tuple | nil, binary}]
  def source_hashes(hash) when is_binary(hash), do: [{nil, hash}]
  def source_hashes(hashes), do: hashes
end
