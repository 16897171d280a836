defmodule VivaTensor.Job.Ranges do
  @moduledoc false
  # Huge tensors, of whose rows a unit does a range: what is done of each, until all is.

  alias VivaTensor.Job.{Admission, Span, Step, Unit}
  alias VivaTensor.{Native, Report}

  @typedoc "What came of a range, and its span in the time line."
  @type part :: %{stats: map, source_hash: binary, parts: [tuple], span: Span.t()}

  @typedoc """
  The ranges of tensors, by the ids of their units. A tensor is closed when it is put aside
  or has to be kept: what is still done of it no longer counts.
  """
  @type t :: %{
          non_neg_integer => {:closed, fate} | %{{non_neg_integer, pos_integer} => part}
        }

  @typedoc "What becomes of a closed tensor."
  @type fate :: {:put_aside, Report.quarantined()} | {:keep, String.t()}

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

  @doc """
  Closes the tensor of a unit, of which this becomes. Its other ranges are not begun any
  more, and those that run are told to leave: the file that they write to may go then.
  """
  @spec close(job, Unit.t(), fate) :: job when job: map
  def close(job, %{rows: nil}, _fate), do: job

  def close(job, %{id: id}, fate) do
    for {_ref, step} <- job.running, of?(step, id), do: Step.cancel(step)
    {dropped, requested} = Enum.split_with(job.requested, fn {_, step} -> of?(step, id) end)
    for {ticket, _step} <- dropped, do: Admission.release(ticket)

    %{
      job
      | ranges: Map.put(job.ranges, id, {:closed, fate}),
        requested: Map.new(requested),
        queue: Enum.reject(job.queue, &of?(&1, id))
    }
  end

  @doc "Whether a unit's ranges, but for those that no longer run, are still being done."
  @spec leaving?(map, Unit.t()) :: boolean
  def leaving?(job, %{id: id}), do: Enum.any?(job.running, fn {_ref, step} -> of?(step, id) end)

  @doc "What becomes of the tensor of a step, if that does a range of one that is closed."
  @spec fate(t, Step.t()) :: fate | nil
  def fate(ranges, %{work: work} = step) do
    with true <- is_tuple(work),
         %{id: id} <- elem(work, 1),
         true <- of?(step, id),
         {:closed, fate} <- ranges[id] do
      fate
    else
      _ -> nil
    end
  end

  # Does a range of that tensor, or looks at one.
  defp of?(%{work: {:unit, unit, _}}, id), do: unit.id == id and unit.rows != nil
  defp of?(%{work: {:recall, unit, _, _}}, id), do: unit.id == id and unit.rows != nil
  defp of?(_step, _id), do: false

  @doc "The hashes of what a recorded unit was made from, each with its rows."
  @spec source_hashes(binary | [{tuple, binary}]) :: [{tuple | nil, binary}]
  def source_hashes(hash) when is_binary(hash), do: [{nil, hash}]
  def source_hashes(hashes), do: hashes
end
