defmodule VivaTensor.Job.QueueTest do
  # Jobs share one admission, and these tests watch units through telemetry.
  use ExUnit.Case, async: false

  import VivaTensor.Test.Jobs

  alias VivaTensor.{Error, Job, Telemetry}
  alias VivaTensor.Job.{Manifest, Queue}
  alias VivaTensor.Test.Directory

  @model "examples/models/viva-tiny"

  setup do
    dir = Directory.create!()
    {:ok, dir: dir, path: Path.join(dir, "state/jobs.queue")}
  end

  defp queue!(c, opts \\ []) do
    opts = Keyword.merge([path: c.path, name: nil, at_once: 1], opts)
    {:ok, queue} = GenServer.start(Queue, opts)
    queue
  end

  defp job(c, name, opts \\ []) do
    [source: @model, to: Path.join(c.dir, name), format: :int8] ++ opts
  end

  defp states(queue) do
    {:ok, entries} = Queue.list(queue)
    for entry <- entries, do: {Path.basename(entry.options[:to]), entry.state, entry.outcome}
  end

  defp await_all(queue),
    do: wait_until(fn -> Enum.all?(states(queue), &(elem(&1, 1) == :ended)) end)

  test "runs jobs in their turn, those of a higher priority first", c do
    id = hold_units()
    queue = queue!(c)
    assert {:ok, 1} = Queue.add(queue, job(c, "first"))
    assert {:ok, 2} = Queue.add(queue, job(c, "low", priority: :low))
    assert {:ok, 3} = Queue.add(queue, job(c, "high", priority: :high))
    assert {:ok, 4} = Queue.add(queue, source: "nothing", to: "out", format: :int8)
    assert [{_, :running, _}, {_, :waiting, _}, {_, :waiting, _}, _] = states(queue)

    assert {:error, %Error{reason: {:invalid_option, _}}} = Queue.add(queue, source: @model)

    Telemetry.detach(id)
    test = self()
    :ok = Telemetry.attach(id, [[:viva_tensor, :job, :start]], fn _, _, m, _ -> send(test, m) end)
    release_while(fn -> await_all(queue) end)

    order =
      for _ <- 1..3 do
        assert_receive %{to: to} when is_binary(to)
        to
      end

    assert [{"first", :ended, :ok}, {"low", :ended, :ok}, {"high", :ended, :ok}, failed] =
             states(queue)

    assert {"out", :ended, "source: " <> _} = failed
    names = for to <- order, do: Path.basename(to)
    assert names == ["high", "out", "low"]
    GenServer.stop(queue)
  end

  test "goes on with all of them after a restart", c do
    id = hold_units()
    queue = queue!(c)
    for name <- ["a", "b", "c"], do: {:ok, _} = Queue.add(queue, job(c, name))

    # Two units of the first are recorded.
    for _ <- 1..2 do
      assert_receive {:holding, worker, _}
      send(worker, :go)
    end

    manifest = Path.join(c.dir, ".a.partial/.manifest")
    wait_until(fn -> File.exists?(manifest) end)
    Process.exit(queue, :kill)
    Telemetry.detach(id)
    wait_until(fn -> not VivaTensor.Native.output_locked(Path.dirname(manifest)) end)
    {:ok, records, _} = Manifest.read(manifest)
    done = Enum.count(records, &match?({:unit, _, _, _}, &1))

    # The end of the file was torn.
    File.write!(c.path, <<0, 0, 1, 0, 7>>, [:append])

    {again, queue} =
      units_done(fn ->
        queue = queue!(c, at_once: 2)
        release_while(fn -> await_all(queue) end)
        queue
      end)

    assert length(again) == 3 * 20 - done
    assert [{"a", :ended, :ok}, {"b", :ended, :ok}, {"c", :ended, :ok}] = states(queue)
    GenServer.stop(queue)
    assert {:ok, []} = Queue.list(queue!(c))
  end

  test "says so where there is none", c do
    assert {:error, %Error{reason: {:no_queue, %{}}} = error} = Job.enqueue(job(c, "out"))
    assert error.message =~ "config :viva_tensor, queue:"
  end
end
