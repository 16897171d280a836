defmodule VivaTensor.Job.QuarantineTest do
  # Units that take too long, die or cannot be done. Jobs share one admission, and these
  # tests watch units through telemetry.
  use ExUnit.Case, async: false

  import VivaTensor.Test.Jobs

  alias VivaTensor.{Error, Job, Native}
  alias VivaTensor.Job.Admission
  alias VivaTensor.Test.{Directory, Safetensors}

  @model "examples/models/viva-tiny"
  @hung "model.layers.0.mlp.up_proj.weight"

  setup do
    dir = Directory.create!()
    {:ok, dir: dir, to: Path.join(dir, "out")}
  end

  # One weight whose search for scales takes a second or so.
  defp slow(dir) do
    noise = Safetensors.normal(64 * 1024, 1)
    bytes = :binary.copy(noise, 128)
    source = Path.join(dir, "slow.safetensors")
    Safetensors.write!(source, [{"slow.weight", "F32", [2048, 4096], bytes}])
    [source: source, to: Path.join(dir, "out"), format: :int4, method: :mse]
  end

  defp running(job) do
    {_, data} = :sys.get_state(job)
    for {_ref, %{work: {:unit, _, _}} = step} <- data.running, do: step
  end

  defp in_native?(job), do: Enum.any?(running(job), &(Native.cancel_calls(&1.cancel) > 0))

  test "a unit that hangs is tried again", c do
    at_unit_start(fn unit ->
      if unit.name == @hung and unit.attempt == 1, do: Process.sleep(:infinity)
    end)

    job = start!(source: @model, to: c.to, format: :int8, unit_timeout: 1_000)
    assert {:ok, report} = Job.await(job)
    assert report.quantized == 14 and report.quarantined == []

    assert_received {:viva_tensor_job, ^job,
                     {:retry, %{work: @hung, attempt: 2, reason: {:timeout, 1_000}}}}
  end

  test "one that always hangs is put aside, and the others are done", c do
    at_unit_start(fn unit -> if unit.name == @hung, do: Process.sleep(:infinity) end)
    job = start!(source: @model, to: c.to, format: :int8, unit_timeout: 1_000)
    assert {:partial, report} = Job.await(job)
    assert [%{name: @hung, attempts: 3, reason: reason}] = report.quarantined
    assert reason == "it took longer than 1000 ms"
    assert length(report.tensors) == 19
    assert Admission.in_flight() == 0
  end

  test "a native call that takes too long leaves when it is told to", c do
    assert {:partial, report} = run([unit_timeout: 10] ++ slow(c.dir))
    assert [%{name: "slow.weight", reason: "it took longer than 10 ms"}] = report.quarantined
    assert Admission.in_flight() == 0
  end

  test "a cancelled job leaves its native calls", c do
    job = start!(slow(c.dir))
    wait_until(fn -> in_native?(job) end)
    {microseconds, result} = :timer.tc(fn -> Job.cancel(job) end)
    assert {:error, %Error{reason: {:cancelled, _}}} = result
    assert microseconds < 1_000_000
    assert Admission.in_flight() == 0
  end

  test "memory is given back when the native call has really returned", c do
    job = start!(slow(c.dir))
    wait_until(fn -> in_native?(job) end)
    [%{pid: worker, cancel: flag, bytes: bytes}] = running(job)
    # Its process goes at once, the call does not.
    Process.exit(worker, :kill)
    assert_receive {:viva_tensor_job, ^job, {:retry, %{reason: :killed}}}

    wait_until(fn ->
      in_flight = Admission.in_flight()
      calls = Native.cancel_calls(flag)
      assert calls == 0 or in_flight >= bytes
      calls == 0
    end)

    # The same where the job is killed.
    wait_until(fn -> in_native?(job) end)
    [%{cancel: flag}] = running(job)
    Process.exit(job, :kill)

    wait_until(fn ->
      in_flight = Admission.in_flight()
      calls = Native.cancel_calls(flag)
      assert calls == 0 or in_flight >= bytes
      calls == 0 and in_flight == 0
    end)
  end

  test "a call that begins after it was told to leave does nothing" do
    flag = Native.cancel_flag()
    assert Native.cancel_calls(flag) == 0
    Native.cancel(flag)
    path = Path.join(Directory.create!(), "shard-0")
    {:ok, checkpoint} = Native.checkpoint_open(@model)
    {:ok, spec} = Native.spec_new(:int8, [], nil)
    tensors = [{"model.norm.weight", :keep}]
    {:ok, shard} = Native.shard_create(path, nil, spec.ref, tensors, checkpoint.ref, %{})

    assert {:error, {:cancelled, _, _}} =
             Native.unit_keep(checkpoint.ref, "model.norm.weight", spec.ref, nil, shard, flag)

    assert Native.cancel_calls(flag) == 0
  end
end
