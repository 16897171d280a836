defmodule VivaTensor.JobTest do
  # Jobs share one admission, and these tests watch units through telemetry.
  use ExUnit.Case, async: false

  import ExUnit.CaptureLog
  import VivaTensor.Test.Jobs

  alias VivaTensor.{Error, Job, Native, Report, Telemetry}
  alias VivaTensor.Test.{Directory, Safetensors}

  @model "examples/models/viva-tiny"

  setup do
    {:ok, dir: Directory.create!()}
  end

  describe "a job" do
    test "compresses the bundled model", %{dir: dir} do
      to = Path.join(dir, "nf4")
      assert {:ok, report} = run(source: @model, to: to, format: :nf4, double_quant: true)

      assert report.quantized == 14
      assert report.kept == 6
      assert report.bits_per_weight < 4.6
      assert report.sqnr_db > 20
      assert report.ratio > 2
      assert report.worst.sqnr_db <= report.sqnr_db
      assert row(report, "model.embed_tokens.weight").reason == "embedding"

      assert_only(dir, ["nf4"])
      assert_only(to, ~w(config.json model.safetensors report.html report.json tokenizer.json))

      size = File.stat!(Path.join(to, "model.safetensors")).size
      assert [%{name: "model.safetensors", bytes: ^size}] = report.files
      assert report.output_bytes == size

      quantized = Enum.filter(report.tensors, &(&1.action == :quantize))
      written = Safetensors.read!(to)
      in_file = for {name, {_, _, bytes}} <- written, name =~ "_proj.weight", do: byte_size(bytes)
      assert quantized |> Enum.map(& &1.output_bytes) |> Enum.sum() == Enum.sum(in_file)

      source = Safetensors.read!(@model)

      for %{action: :keep, name: name} <- report.tensors do
        assert Map.fetch!(written, name) == Map.fetch!(source, name)
      end

      assert File.read!(Path.join(to, "tokenizer.json")) ==
               File.read!(Path.join(@model, "tokenizer.json"))

      {:ok, config} = to |> Path.join("config.json") |> File.read!() |> Native.json_decode()
      assert config["model_type"] == "llama"
      assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]

      {:ok, json} = to |> Path.join("report.json") |> File.read!() |> Native.json_decode()
      assert json["output_bytes"] == size
      assert json["recipe"]["format"] == "nf4"
      assert length(json["tensors"]) == 20
      assert json["versions"]["otp"] == System.otp_release()

      table = Report.table(report)
      assert table =~ "model.layers.*.mlp.down_proj.weight"
      assert table =~ "kept: embedding"
      assert Report.table(report, tensors: true) =~ "model.layers.1.mlp.down_proj.weight"
    end

    test "tells its story", %{dir: dir} do
      test = self()
      events = for what <- [:job, :unit], at <- [:start, :stop], do: [:viva_tensor, what, at]
      :ok = Telemetry.attach("story", events, fn e, m, _, _ -> send(test, {e, m}) end)
      on_exit(fn -> Telemetry.detach("story") end)

      job = start!(source: @model, to: Path.join(dir, "out"), format: :int8)
      {:ok, report} = Job.await(job)

      assert_received {:viva_tensor_job, ^job, {:planned, %{tensors: 20, bytes: bytes}}}
      assert bytes == report.tensors |> Enum.map(& &1.input_bytes) |> Enum.sum()
      for row <- report.tensors, do: assert_received({:viva_tensor_job, ^job, {:unit, ^row}})
      assert_received {:viva_tensor_job, ^job, {:done, {:ok, ^report}}}

      assert_received {[:viva_tensor, :job, :start], %{system_time: _}}
      assert_received {[:viva_tensor, :unit, :start], %{system_time: _}}
      assert_received {[:viva_tensor, :unit, :stop], %{duration: d, input_bytes: _}} when d > 0
      assert_received {[:viva_tensor, :job, :stop], %{duration: _, output_bytes: _}}

      assert {:ok, %{state: :done, tensors: 20, tensors_done: 20, running: []}} = Job.status(job)
      # It goes on answering.
      assert Job.await(job) == {:ok, report}
      assert Job.cancel(job) == {:ok, report}
    end

    test "informs who asks later, with what it does and what it takes", %{dir: dir} do
      hold_units()
      {:ok, job} = Job.start(source: @model, to: Path.join(dir, "out"), format: :int8)
      assert_receive {:holding, worker, %{name: name}}
      assert {:ok, %{state: :running, quarantined: 0} = status} = Job.subscribe(job)
      assert %{name: ^name, attempt: 1, seconds: seconds} = hd(status.units)
      assert seconds < 60 and status.running == Enum.map(status.units, & &1.name)
      assert %{in_flight: in_flight, limit: 512_000_000, native: _} = status.memory
      assert in_flight > 0
      send(worker, :go)

      log = capture_log(fn -> {:ok, _} = release_while(fn -> Job.await(job) end) end)
      assert_received {:viva_tensor_job, ^job, {:unit, %{name: ^name}}}
      assert_received {:viva_tensor_job, ^job, {:done, {:ok, _}}}
      lines = for line <- String.split(log, "\n"), line =~ "unit=", do: line
      assert length(lines) == 20
      assert Enum.any?(lines, &(&1 =~ ~r/action=quantize format=int8 input_bytes=\d+ .*sqnr_db=/))
    end

    test "refuses options that make no sense", %{dir: dir} do
      for {opts, option} <- [
            {[source: nil], "source"},
            {[to: nil], "to"},
            {[memory_limit: "lots"], "memory_limit"},
            {[max_shard_size: 0], "max_shard_size"},
            {[max_concurrency: 0], "max_concurrency"},
            {[force: :yes], "force"},
            {[notify: :me], "notify"},
            {[resume: 1], "resume"},
            {[unit_timeout: 0], "unit_timeout"},
            {[priority: :urgent], "priority"},
            {[recipe: "nf4", format: nil], "recipe"},
            {[blok_size: 32], "blok_size"}
          ] do
        opts = Keyword.merge([source: @model, to: Path.join(dir, "out"), format: :nf4], opts)
        assert {:error, %Error{reason: {:invalid_option, %{option: ^option}}}} = Job.start(opts)
      end

      assert_only(dir, [])
    end

    test "answers an await that comes too early, and is gone when it is gone", %{dir: dir} do
      hold_units()
      job = start!(source: @model, to: Path.join(dir, "out"), format: :nf4)
      assert_receive {:holding, worker, %{name: name}}
      assert {:error, %Error{reason: {:timeout, _}}} = Job.await(job, 10)
      assert {:ok, %{state: :running, running: running}} = Job.status(job)
      assert name in running

      send(worker, :go)
      assert {:error, %Error{reason: {:cancelled, _}}} = release_while(fn -> Job.cancel(job) end)
      GenServer.stop(job)
      assert {:error, %Error{reason: {:no_job, _}}} = Job.await(job)
    end
  end

  describe "a worker that dies" do
    test "is replaced, and the output is the same", %{dir: dir} do
      calm = Path.join(dir, "calm")
      {:ok, _} = run(source: @model, to: calm, format: :nf4)

      test = self()

      at_unit_start(fn unit ->
        if unit.attempt == 1 and unit.name =~ "down_proj" do
          send(test, {:killed, unit.name})
          Process.exit(self(), :kill)
        end
      end)

      to = Path.join(dir, "out")
      job = start!(source: @model, to: to, format: :nf4)
      assert {:ok, report} = Job.await(job)
      assert report.quantized == 14

      for layer <- 0..1 do
        name = "model.layers.#{layer}.mlp.down_proj.weight"
        assert_received {:killed, ^name}

        assert_received {:viva_tensor_job, ^job,
                         {:retry, %{work: ^name, attempt: 2, reason: :killed}}}
      end

      assert digests(to) == digests(calm)
    end

    test "is replaced when it is killed from outside in the middle of its unit", %{dir: dir} do
      hold_units()
      job = start!(source: @model, to: Path.join(dir, "out"), format: :int8, max_concurrency: 1)
      assert_receive {:holding, worker, %{name: name, attempt: 1}}
      Process.exit(worker, :kill)
      assert_receive {:viva_tensor_job, ^job, {:retry, %{work: ^name}}}
      assert {:ok, %Report{kept: 6}} = release_while(fn -> Job.await(job) end)
    end

    test "again and again ends as partial, and names the tensor", %{dir: dir} do
      test = self()
      events = for what <- [:exception, :quarantine], do: [:viva_tensor, :unit, what]
      :ok = Telemetry.attach("crash", events, fn [_, _, e], _, m, _ -> send(test, {e, m}) end)
      on_exit(fn -> Telemetry.detach("crash") end)
      name = "model.layers.0.self_attn.o_proj.weight"
      at_unit_start(fn unit -> if unit.name == name, do: Process.exit(self(), :kill) end)

      to = Path.join(dir, "out")
      job = start!(source: @model, to: to, format: :nf4)
      assert {:partial, report} = Job.await(job)
      why = %{name: name, reason: "its worker died: :killed", attempts: 3}
      assert report.quarantined == [why]
      assert report.quantized == 13 and report.files == []
      for attempt <- 1..3, do: assert_received({:exception, %{attempt: ^attempt, crash: :killed}})
      assert_received {:quarantine, %{name: ^name, attempts: 3}}
      assert_received {:viva_tensor_job, ^job, {:quarantined, ^why}}
      assert Report.table(report) =~ "PARTIAL    1 tensors could not be done"
      # What is done is kept, and a report with it.
      assert_only(dir, [".out.partial"])
      json = File.read!(Path.join(dir, ".out.partial/report.json"))
      assert {:ok, %{"quarantined" => [%{"name" => ^name}]}} = Native.json_decode(json)
    end
  end

  describe "an end before the end" do
    test "cancel stops, answers all who wait and leaves nothing", %{dir: dir} do
      hold_units()
      job = start!(source: @model, to: Path.join(dir, "out"), format: :nf4, max_concurrency: 2)
      waiting = Task.async(fn -> Job.await(job) end)
      assert_receive {:holding, _, _} = first
      assert [_temporary] = File.ls!(dir)
      send(self(), first)

      cancel = Task.async(fn -> Job.cancel(job) end)
      wait_until(fn -> match?({:stopping, _}, :sys.get_state(job)) end)
      cancelled = release_while(fn -> Job.await(job) end)
      assert {:error, %Error{reason: {:cancelled, %{}}}} = cancelled
      assert Task.await(cancel, :infinity) == cancelled
      assert Task.await(waiting, :infinity) == cancelled
      assert Job.await(job) == cancelled
      assert_only(dir, [])
    end

    test "a killed job leaves nothing, and its workers go", %{dir: dir} do
      hold_units()
      job = start!(source: @model, to: Path.join(dir, "out"), format: :nf4, max_concurrency: 1)
      assert_receive {:holding, worker, _}
      assert_only(dir, [".out.partial"])
      monitors = for pid <- [job, worker], do: {pid, Process.monitor(pid)}

      Process.exit(job, :kill)
      assert {_, down} = List.keyfind(monitors, job, 0)
      assert_receive {:DOWN, ^down, _, _, :killed}
      # The answer to any call shows that the news has been dealt with.
      :sys.get_state(VivaTensor.Job.Outputs)
      assert_only(dir, [])

      send(worker, :go)
      assert {_, down} = List.keyfind(monitors, worker, 0)
      assert_receive {:DOWN, ^down, _, _, :normal}
      assert_only(dir, [])
      assert VivaTensor.Job.Admission.in_flight() == 0
    end

    test "the loss of what stands above a job takes it down, with its output", %{dir: dir} do
      hold_units()

      for name <- [VivaTensor.Job.Workers, VivaTensor.Job.Outputs] do
        job = start!(source: @model, to: Path.join(dir, "out"), format: :nf4, max_concurrency: 1)
        assert_receive {:holding, worker, %{job: ^job}}
        assert [_temporary] = File.ls!(dir)
        supervisor = Process.whereis(VivaTensor.Job.Supervisor)
        monitor = Process.monitor(job)

        capture_log(fn ->
          name |> Process.whereis() |> Process.exit(:kill)
          # Shut down by the supervisor, unless it missed its workers first.
          assert_receive {:DOWN, ^monitor, _, _, _}
          await_another(VivaTensor.Job.Supervisor, supervisor)
        end)

        assert_only(dir, [])
        send(worker, :go)
      end

      assert {:ok, _} = release_while(fn -> run(source: @model, to: dir, format: :nf4) end)
    end

    defp await_another(name, pid) do
      if Process.whereis(name) in [nil, pid] do
        Process.sleep(1)
        await_another(name, pid)
      end
    end

    test "a linked job ends with its caller", %{dir: dir} do
      hold_units()
      test = self()

      caller =
        spawn(fn ->
          {:ok, job} = Job.start_link(source: @model, to: Path.join(dir, "out"), format: :nf4)
          send(test, {:job, job})
          Process.sleep(:infinity)
        end)

      assert_receive {:job, job}
      assert_receive {:holding, _, _}
      monitor = Process.monitor(job)
      Process.exit(caller, :shutdown)
      assert_receive {:DOWN, ^monitor, _, _, :shutdown}
      assert_only(dir, [])
    end
  end

  describe "admission" do
    defp most_at_once(opts) do
      counter = :counters.new(2, [])

      at_unit_start(fn _ ->
        :counters.add(counter, 1, 1)
        running = :counters.get(counter, 1)
        if running > :counters.get(counter, 2), do: :counters.put(counter, 2, running)
        # Long enough that units which may run together do.
        Process.sleep(5)
        :counters.sub(counter, 1, 1)
      end)

      {:ok, _} = run(opts)
      :counters.get(counter, 2)
    end

    test "one unit at a time under a tiny limit", %{dir: dir} do
      opts = [source: @model, to: Path.join(dir, "out"), format: :nf4, max_concurrency: 4]
      assert most_at_once([memory_limit: 1] ++ opts) == 1
    end

    test "as many as allowed under a large one", %{dir: dir} do
      opts = [source: @model, to: Path.join(dir, "out"), format: :nf4, max_concurrency: 3]
      assert most_at_once([memory_limit: "1GB"] ++ opts) == 3
    end

    test "several jobs at once", %{dir: dir} do
      jobs =
        for n <- 1..4 do
          start!(source: @model, to: Path.join(dir, "#{n}"), format: :nf4, memory_limit: "1MB")
        end

      for job <- jobs, do: assert({:ok, %Report{quantized: 14}} = Job.await(job))
      assert 1..4 |> Enum.map(&digests(Path.join(dir, "#{&1}"))) |> Enum.uniq() |> length() == 1
    end
  end

  describe "weights that are not finite" do
    test "are put aside by name", %{dir: dir} do
      for what <- [:nan, :inf, :neg_inf] do
        source = weights(Path.join(dir, "in/model.safetensors"), poison: what)
        to = Path.join(dir, "out-#{what}")

        assert {:partial, %Report{quarantined: [aside]} = report} =
                 run(source: source, to: to, format: :nf4)

        assert %{name: "layers.0.down.weight", attempts: 3} = aside
        assert aside.reason =~ "the first at element 77"
        assert report.quantized == 2 and report.kept == 1
        refute File.exists?(to)
      end
    end

    test "are kept where the recipe says so", %{dir: dir} do
      source = weights(Path.join(dir, "in/model.safetensors"), poison: :nan)
      to = Path.join(dir, "out")
      job = start!(source: source, to: to, format: :nf4, non_finite: :keep)
      assert {:ok, report} = Job.await(job)

      assert_received {:viva_tensor_job, ^job, {:kept, %{name: "layers.0.down.weight"}}}
      assert report.quantized == 2
      assert row(report, "layers.0.down.weight").reason == "1 NaN and 0 infinite values"

      before = Safetensors.read!(source)
      written = Safetensors.read!(to)
      assert written["layers.0.down.weight"] == before["layers.0.down.weight"]
      refute written["layers.0.up.weight"] == before["layers.0.up.weight"]
      assert {:ok, %{tensors_done: 4, bytes_done: same, bytes: same}} = Job.status(job)

      # The other weights are what they are without the bad one.
      healthy = Path.join(dir, "healthy")

      {:ok, _} =
        run(source: weights(Path.join(dir, "in2/model.safetensors")), to: healthy, format: :nf4)

      others = &Map.reject(Safetensors.read!(&1), fn {name, _} -> name =~ "0.down" end)
      assert others.(to) == others.(healthy)
    end

    test "are kept in shards that stay within their size", %{dir: dir} do
      source = weights(Path.join(dir, "in/model.safetensors"), poison: :inf)
      to = Path.join(dir, "out")

      {:ok, report} =
        run(
          source: source,
          to: to,
          format: :nf4,
          non_finite: :keep,
          # Two quantized weights fit, a quantized and a kept one do not.
          max_shard_size: 20_000
        )

      names = Enum.map(report.files, & &1.name)

      assert Enum.sort(names) ==
               to
               |> File.ls!()
               |> Enum.filter(&(&1 =~ "safetensors"))
               |> Enum.reject(&(&1 =~ "json"))
               |> Enum.sort()

      assert length(names) > 1

      {:ok, index} =
        to |> Path.join("model.safetensors.index.json") |> File.read!() |> Native.json_decode()

      for {tensor, file} <- index["weight_map"] do
        assert Map.has_key?(Safetensors.read!(Path.join(to, file)), tensor)
      end

      assert Map.keys(index["weight_map"]) == to |> Safetensors.read!() |> Map.keys()

      assert Safetensors.read!(to)["layers.0.down.weight"] ==
               Safetensors.read!(source)["layers.0.down.weight"]
    end
  end
end
