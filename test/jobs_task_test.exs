defmodule VivaTensor.JobsTaskTest do
  # The task writes to standard output and standard error.
  use ExUnit.Case, async: false
  doctest VivaTensor.CLI.Jobs

  import VivaTensor.Test.Jobs

  alias Mix.Tasks.Viva.Jobs
  alias VivaTensor.{Job, Native, Test}
  alias VivaTensor.Test.Directory

  @model "examples/models/viva-tiny"

  setup do
    dir = Directory.create!()
    {:ok, dir: dir, to: Path.join(dir, "out")}
  end

  defp task(argv), do: Test.Task.run(Jobs, argv)

  test "lists what is unfinished, resumes it and reports", c do
    assert {0, "no unfinished job in " <> _, ""} = task(["list", c.dir])
    interrupt!([source: @model, to: c.to, format: :nf4], 5)

    assert {0, table, ""} = task(["list", c.dir])
    assert table =~ ~r{/out +unfinished +nf4 +5/20}
    assert {0, json, ""} = task(["list", c.dir, "--json"])
    assert {:ok, [%{"state" => "unfinished", "tensors_done" => 5}]} = Native.json_decode(json)

    assert {1, "", stderr} = task(["follow", c.to])
    assert stderr =~ "no job is writing"
    assert {1, "", _} = task(["cancel", c.to])

    assert {again, {0, stdout, _}} = units_done(fn -> task(["resume", c.to]) end)
    assert length(again) == 15
    assert stdout =~ "quantized  14 tensors"
    assert {0, stdout, ""} = task(["report", c.to])
    assert stdout =~ "tensors    20, 14 quantized"
    assert {0, json, ""} = task(["report", c.to, "--json"])
    assert {:ok, %{"quantized" => 14}} = Native.json_decode(json)
    assert {4, "", stderr} = task(["resume", c.to])
    assert stderr =~ "no job left anything"
  end

  # A job that has recorded something, and is held in its next unit.
  defp begun!(c) do
    job = held!([source: @model, to: c.to, format: :nf4], 3)

    wait_until(fn -> File.exists?(Path.join(c.dir, ".out.partial/.manifest")) end)
    job
  end

  test "cancels a job of whichever process", c do
    job = begun!(c)
    {0, table, ""} = task(["list", c.dir])
    assert table =~ "running"
    cancel = Task.async(fn -> task(["cancel", c.to]) end)
    wait_until(fn -> match?({:stopping, _}, :sys.get_state(job)) end)
    assert {:error, %{reason: {:cancelled, _}}} = release_while(fn -> Job.await(job) end)
    assert {0, stdout, ""} = Task.await(cancel, :infinity)
    assert stdout =~ "mix viva.jobs resume"
    refute File.exists?(Path.join(c.dir, ".out.cancel"))
  end

  test "follows a job to its report", c do
    job = begun!(c)
    follow = Task.async(fn -> task(["follow", c.to]) end)
    # It has looked once.
    wait_until(fn ->
      Process.info(follow.pid, :current_function) == {:current_function, {Process, :sleep, 1}}
    end)

    assert {:ok, _} = release_while(fn -> Job.await(job) end)
    assert {0, stdout, stderr} = Task.await(follow, :infinity)
    assert stderr =~ "/20 tensors"
    assert stdout =~ "tensors    20, 14 quantized"
  end

  test "reports what was put aside", c do
    source = weights(Path.join(c.dir, "in/model.safetensors"), poison: :nan)
    {:partial, _} = run(source: source, to: c.to, format: :nf4)
    assert {1, stdout, ""} = task(["report", c.to])
    assert stdout =~ "put aside  layers.0.down.weight: 1 NaN"
    assert {0, stdout, _} = task(["resume", c.to, "--non-finite", "keep"])
    assert stdout =~ "kept: 1 NaN"
  end

  test "explains wrong usage" do
    for {argv, message} <- [
          {[], "which subcommand?"},
          {["stop", "x"], "there are list, follow"},
          {["list", "x", "--threads", "1"], "list takes no --threads"},
          {["resume"], "resume of which DIR?"},
          {["report", "a", "b"], ~s(what is "b"?)}
        ] do
      assert {2, "", stderr} = task(argv)
      assert stderr =~ message
    end

    assert {0, stdout, _} = task(["--help"])
    assert stdout =~ "mix viva.jobs follow DIR"
  end
end
