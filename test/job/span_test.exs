defmodule VivaTensor.Job.SpanTest do
  # Jobs share one admission, and these tests watch units through telemetry.
  use ExUnit.Case, async: false
  doctest VivaTensor.Job.Span

  import VivaTensor.Test.Jobs

  alias VivaTensor.Job
  alias VivaTensor.Test.Directory

  @model "examples/models/viva-tiny"

  setup do
    {:ok, opts: [source: @model, to: Path.join(Directory.create!(), "out"), format: :nf4]}
  end

  test "the units of a worker follow one another, within the time of the job", %{opts: opts} do
    {:ok, report} = run([max_concurrency: 3] ++ opts)

    for {worker, rows} <- Enum.group_by(report.tensors, & &1.worker) do
      assert worker in 0..2

      ends =
        for row <- Enum.sort_by(rows, & &1.began), reduce: 0.0 do
          previous ->
            assert row.began >= previous and row.ended >= row.began
            row.ended
        end

      assert ends <= report.seconds
    end

    assert Enum.all?(report.tensors, &match?(%{attempt: 1, verified: false}, &1))
  end

  test "units that run at once have workers of their own", %{opts: opts} do
    hold_units()
    job = start!([max_concurrency: 2] ++ opts)
    workers = for _ <- 1..2, do: receive(do: ({:holding, worker, unit} -> {worker, unit.name}))
    for {worker, _} <- workers, do: send(worker, :go)
    {:ok, report} = release_while(fn -> Job.await(job) end)
    [one, other] = for {_, name} <- workers, do: row(report, name)
    assert Enum.sort([one.worker, other.worker]) == [0, 1]
    assert one.began < other.ended and other.began < one.ended
  end

  test "an attempt that failed counts, and is not in the span of the one that did not", c do
    first = :counters.new(1, [])

    at_unit_start(fn unit ->
      if unit.name == "model.norm.weight" and :counters.get(first, 1) == 0 do
        :counters.add(first, 1, 1)
        Process.exit(self(), :kill)
      end
    end)

    {:ok, report} = run(c.opts)
    assert row(report, "model.norm.weight").attempt == 2
  end

  test "a job that goes on tells when it verified what was done", %{opts: opts} do
    interrupt!(opts, 6)
    {:ok, job} = Job.resume(opts[:to])
    {:ok, report} = Job.await(job)
    {verified, done} = Enum.split_with(report.tensors, & &1.verified)
    assert {length(verified), length(done)} == {6, 14}
    for row <- report.tensors, do: assert(row.began >= 0 and row.ended <= report.seconds)
  end
end
