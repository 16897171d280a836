defmodule VivaTensor.Job.RangesTest do
  # A tensor of which each unit does a range of rows. Jobs share one admission, and these
  # tests watch units through telemetry.
  use ExUnit.Case, async: false

  import VivaTensor.Test.Faults, only: [flip: 2, huge!: 1, huge!: 2]
  import VivaTensor.Test.Jobs

  alias VivaTensor.{Error, Job, Native, Telemetry, Tensor}
  alias VivaTensor.Job.{Manifest, Ranges, Unit}
  alias VivaTensor.Test.{Directory, Safetensors}

  @name "huge.weight"
  @columns 1024
  # A range has 64 MiB: these are two and a part of a third.
  @rows 40_000
  @ranges [{0, 16_384}, {16_384, 32_768}, {32_768, @rows}]

  setup do
    dir = Directory.create!()
    source = Path.join(dir, "in/model.safetensors")
    {:ok, dir: dir, source: source, to: Path.join(dir, "out"), calm: Path.join(dir, "calm")}
  end

  defp poison(bytes), do: Safetensors.poison(bytes, 33_000 * @columns, :nan)

  # The ranges that are really done while `fun` runs, and its result.
  defp ranges_done(fun) do
    test = self()
    id = make_ref()
    handler = fn _, _, unit, _ -> send(test, {id, unit.rows}) end
    :ok = Telemetry.attach(id, [[:viva_tensor, :unit, :stop]], handler)
    result = fun.()
    Telemetry.detach(id)
    {id |> received() |> Enum.reject(&is_nil/1) |> Enum.sort(), result}
  end

  defp received(id) do
    receive do
      {^id, rows} -> [rows | received(id)]
    after
      0 -> []
    end
  end

  defp partial(c), do: Path.join(c.dir, ".out.partial")

  test "each range is a unit, and their tensor one of the report", c do
    huge!(c.source)
    opts = [source: c.source, format: :nf4, double_quant: false, notify: self()]
    {done, {:ok, report}} = ranges_done(fn -> run([to: c.to] ++ opts) end)
    assert done == @ranges

    row = row(report, @name)
    assert for(%{rows: [first, last]} <- row.ranges, do: {first, last}) == @ranges
    assert row.input_bytes == 4 * @rows * @columns
    assert row.began == row.ranges |> Enum.map(& &1.began) |> Enum.min()
    assert_received {:viva_tensor_job, _, {:unit, ^row}}

    # As of the whole tensor, which one worker would have done.
    {_, _, bytes} = Safetensors.read!(c.source)[@name]
    x = Tensor.from_binary!(bytes, :f32, [@rows, @columns])
    q = VivaTensor.quantize!(x, :nf4, double_quant: false)
    metrics = VivaTensor.metrics!(x, q)
    assert_in_delta row.sqnr_db, metrics.sqnr_db, 1.0e-9
    assert_in_delta row.cosine, metrics.cosine, 1.0e-12
    assert row.max_error == metrics.max_error
    {_, _, codes} = Safetensors.read!(c.to)[@name]
    assert byte_size(codes) == div(@rows * @columns, 2)

    assert {:ok, page} = c.to |> Path.join("report.html") |> File.read()
    for {first, last} <- @ranges, do: assert(page =~ "rows #{first} to #{last - 1}")

    # Whoever does which, in whatever order.
    {:ok, other} = run([to: c.calm, max_concurrency: 1] ++ opts)
    assert digests(c.calm) == digests(c.to)
    assert figures(other) == figures(report)
  end

  test "a killed job does again what was not recorded, and what is damaged", c do
    huge!(c.source)
    opts = [source: c.source, format: :nf4, double_quant: false]
    {:ok, calm} = run([to: c.calm] ++ opts)
    interrupt!([to: c.to] ++ opts, 2)
    {:ok, records, _} = Manifest.read(Path.join(partial(c), ".manifest"))
    assert for({:rows, _, @name, rows, _} <- records, do: rows) == Enum.take(@ranges, 2)

    assert {:ok, %{tensors_done: 0, bytes_done: bytes}} = Job.Unfinished.of(c.to)
    assert bytes == 2 * 64 * 1024 * 1024

    # A byte in the middle of the second range, of 20 MiB of codes.
    shard = Path.join(partial(c), "shard-0")
    content = File.read!(shard)
    File.write!(shard, flip(content, 12_000_000))

    {again, {:ok, report}} = ranges_done(fn -> resume(c) end)
    assert again == Enum.drop(@ranges, 1)
    assert digests(c.to) == digests(c.calm)
    assert figures(report) == figures(calm)
    assert [true, false, false] = for(r <- row(report, @name).ranges, do: r.verified)
  end

  test "a source that was only touched is gone on with, another is refused", c do
    huge!(c.source)
    interrupt!([to: c.to, source: c.source, format: :int8], 2)
    content = File.read!(c.source)
    File.write!(c.source, flip(content, 100_000_000))
    assert {:error, %Error{reason: {:changed, %{changes: [change]}}}} = resume(c)
    assert change == %{what: @name, how: "has other values"}
    File.write!(c.source, content)
    {again, {:ok, _report}} = ranges_done(fn -> resume(c) end)
    assert again == Enum.drop(@ranges, 2)
    # The same of a tensor that is done.
    File.rm_rf!(c.to)
    interrupt!([to: c.to, source: c.source, format: :int8], 3)
    File.touch!(c.source)
    assert {[], {:ok, _report}} = ranges_done(fn -> resume(c) end)
  end

  test "a range that cannot be done puts its tensor aside, once", c do
    huge!(c.source, &poison/1)
    opts = [source: c.source, to: c.to, format: :int8]
    assert {:partial, report} = run(opts)
    assert [%{name: @name, attempts: 3, reason: reason}] = report.quarantined
    assert reason =~ "1 NaN" and reason =~ "the first at element #{33_000 * @columns}"
    assert [%{name: "norm.weight"}] = report.tensors

    {_, {:ok, report}} = ranges_done(fn -> resume(c, non_finite: :keep) end)
    assert %{action: :keep, reason: reason} = row(report, @name)
    assert reason =~ "NaN"
    assert Safetensors.read!(c.to)[@name] == Safetensors.read!(c.source)[@name]
  end

  test "the other ranges have left before what they write to is removed", c do
    huge!(c.source, &Safetensors.poison(&1, 5, :nan))
    test = self()

    # Two are in their units when the first turns out to be NaN, and one is not begun.
    at_unit_start(fn unit ->
      if unit.rows == {16_384, 32_768} do
        send(test, {:holding, self()})
        receive do: (:go -> :ok)
      end
    end)

    opts = [source: c.source, to: c.to, format: :int8, max_concurrency: 2]
    job = start!([non_finite: :keep] ++ opts)
    assert_receive {:holding, worker}
    assert_receive {:viva_tensor_job, ^job, {:kept, %{name: @name}}}
    assert {:ok, %{state: :running}} = Job.status(job)
    send(worker, :go)
    assert {:ok, report} = Job.await(job)
    assert %{action: :keep} = row(report, @name)
    assert Safetensors.read!(c.to)[@name] == Safetensors.read!(c.source)[@name]
    assert {:ok, %{state: :done}} = Job.status(job)

    # The same of one that is put aside.
    File.rm_rf!(c.to)
    job = start!(opts)
    assert_receive {:holding, worker}
    assert_receive {:viva_tensor_job, ^job, {:quarantined, %{name: @name}}}
    send(worker, :go)
    assert {:partial, %{quarantined: [%{name: @name}]}} = Job.await(job)
    assert {:ok, %{state: :done}} = Job.status(job)
  end

  test "a worker that dies is followed by another", c do
    huge!(c.source)
    {:ok, _} = run(source: c.source, to: c.calm, format: :int8)

    at_unit_start(fn unit ->
      if unit.rows == {16_384, 32_768} and unit.attempt == 1, do: Process.exit(self(), :kill)
    end)

    assert {:ok, report} = run(source: c.source, to: c.to, format: :int8)
    assert [1, 2, 1] = for(range <- row(report, @name).ranges, do: range.attempt)
    assert digests(c.to) == digests(c.calm)
  end

  test "what memory a range takes does not grow with its tensor", c do
    {:ok, spec} = VivaTensor.Recipe.spec(VivaTensor.Recipe.new!(:int8))
    huge!(c.source)
    {:ok, checkpoint} = Native.checkpoint_open(c.source)
    assert {:ok, {16_384, bytes}} = Native.plan_rows(spec, checkpoint.ref, @name)
    assert bytes in (64 * 1024 * 1024)..(96 * 1024 * 1024)
    assert {:ok, nil} = Native.plan_rows(spec, checkpoint.ref, "norm.weight")
  end

  defp resume(c, opts \\ []) do
    with {:ok, job} <- Job.resume(c.to, opts), do: Job.await(job)
  end

  test "a tensor that is closed takes no more ranges" do
    unit = %Unit{
      id: 7,
      name: "a",
      shape: [4, 4],
      dtype: "f32",
      action: :quantize,
      input_bytes: 64,
      output_bytes: 16
    }

    [first, second] = Unit.ranges(%{unit | rows_at_once: 2})
    steps = for part <- [first, second, unit], do: VivaTensor.Job.Step.unit(part, [0])
    fate = {:keep, "NaN"}
    job = %{ranges: %{}, queue: steps, requested: %{}, running: %{}}
    job = Ranges.close(job, first, fate)
    assert [%{work: {:unit, ^unit, [0]}}] = job.queue
    assert [^fate, ^fate, nil] = Enum.map(steps, &Ranges.fate(job.ranges, &1))
  end
end
