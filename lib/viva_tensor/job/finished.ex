defmodule VivaTensor.Job.Finished do
  @moduledoc false
  # What a finished unit adds to its job: a record of it, and its place in the tally.

  alias VivaTensor.Job.{Events, Ledger, Ranges, Resumption, Span, Step, Tally, Unit}
  alias VivaTensor.Report

  @doc "A tensor, or a range of one, that was done now."
  @spec unit(job, Unit.t(), Step.t(), Unit.done()) :: job when job: map
  def unit(job, %{rows: nil} = unit, step, done), do: tensor(job, unit, step, {done, nil})

  def unit(job, unit, %{work: {_, _, id}} = step, done) do
    part = Ranges.part(done, Span.of(step, job.started))
    record = {:rows, id, unit.name, unit.rows, part}
    range(%{job | ledger: Ledger.add(job.ledger, record, job.tally.shards[id])}, unit, step, part)
  end

  @doc "Those of tensors that one worker did one by one, each with when it was begun and ended."
  @spec units(job, [{Unit.t(), {integer, integer}, term}], Step.t()) :: job when job: map
  def units(job, results, step) do
    for {unit, {started, ended}, {:ok, done}} <- results, reduce: job do
      job -> unit(job, unit, %{step | started: started, ended: ended}, done)
    end
  end

  @doc "One that was done by an earlier job and is as it was recorded."
  @spec verified(job, Unit.t(), Step.t(), Resumption.unit()) :: job when job: map
  def verified(job, unit, step, {:rows, part}),
    do: range(job, unit, step, %{part | span: Span.of(step, job.started)})

  def verified(job, unit, %{work: {_, _, id, _}} = step, {:unit, %{row: row}}) do
    span = Span.of(step, job.started)
    row = Span.put(row, span)
    Events.notify(job, {:unit, row})
    ledger = Ledger.add(job.ledger, {:verified, unit.name, span})
    %{job | ledger: ledger, tally: Tally.done(job.tally, id, row)}
  end

  defp range(job, unit, step, part) do
    counts = {0, part.stats.input_bytes, part.stats.output_bytes}
    {whole, ranges} = Ranges.add(job.ranges, unit, part)
    job = %{job | ranges: ranges, tally: Tally.add(job.tally, elem(step.work, 2), counts)}
    if whole, do: tensor(job, unit, step, whole), else: job
  end

  defp tensor(job, unit, step, {{stats, source_hash, parts}, spans}) do
    id = elem(step.work, 2)
    row = unit |> Report.row(stats) |> Span.put(Span.of(step, job.started))
    row = if spans, do: Ranges.put(row, spans), else: row
    record = {:unit, id, unit.name, %{row: row, source_hash: source_hash, parts: parts}}
    ledger = Ledger.add(job.ledger, record, job.tally.shards[id])
    Events.unit_done(job, step, row)
    %{job | ledger: ledger, tally: Tally.done(job.tally, id, row)}
  end
end
