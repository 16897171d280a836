defmodule VivaTensor.Job.ResumeTest do
  # Jobs share one admission, and these tests watch units through telemetry.
  use ExUnit.Case, async: false
  doctest VivaTensor.Job.Manifest

  import VivaTensor.Test.Jobs
  import VivaTensor.Test.Faults, only: [flip: 2]

  alias VivaTensor.{Calibration, Error, Job, Native, Report, Telemetry}
  alias VivaTensor.Job.Manifest
  alias VivaTensor.Test.{Directory, Faults, Safetensors}

  @model "examples/models/viva-tiny"

  setup do
    dir = Directory.create!()
    {:ok, dir: dir, calm: Path.join(dir, "calm"), to: Path.join(dir, "out")}
  end

  defp names(dir), do: dir |> File.ls!() |> Enum.sort()
  defp partial(to), do: Path.join(Path.dirname(to), ".#{Path.basename(to)}.partial")
  defp manifest(to), do: Path.join(partial(to), ".manifest")

  defp resume(to, opts \\ []) do
    with {:ok, job} <- Job.resume(to, opts), do: Job.await(job)
  end

  # An interrupted job is gone on with to the bytes of one that nothing interrupted.
  defp assert_resumed(c, opts, count) do
    {:ok, calm} = run([to: c.calm] ++ opts)
    interrupt!([to: c.to] ++ opts, count)
    {:ok, records, _} = Manifest.read(manifest(c.to))
    done = for {:unit, _, name, _} <- records, do: name
    {again, {:ok, report}} = units_done(fn -> resume(c.to) end)
    assert digests(c.to) == digests(c.calm)
    assert figures(report) == figures(calm) and report.files == calm.files
    {done, again, report}
  end

  describe "a job that was killed" do
    test "is gone on with, and no unit is done twice", c do
      {done, again, report} = assert_resumed(c, [source: @model, format: :nf4], 7)
      assert length(done) == 7
      assert Enum.sort(done ++ again) == Enum.sort(for row <- report.tensors, do: row.name)
      assert names(c.dir) == ["calm", "out"]
      assert report.source == Path.expand(@model)
    end

    test "after each number of units, in shards", c do
      opts = [source: @model, format: :int8, max_shard_size: 600_000]
      {:ok, _} = run([to: c.calm] ++ opts)

      for count <- [1, 5, 12, 19] do
        interrupt!([to: c.to] ++ opts, count)
        assert {again, {:ok, _}} = units_done(fn -> resume(c.to) end)
        assert length(again) == 20 - count
        assert digests(c.to) == digests(c.calm)
        File.rm_rf!(c.to)
      end
    end

    test "before a unit was done leaves nothing", c do
      interrupt!([source: @model, to: c.to, format: :nf4], 0)
      assert names(c.dir) == []

      assert {:error, %Error{op: :output, reason: {:nothing_to_resume, %{path: path}}}} =
               Job.resume(c.to)

      assert path == c.to
    end

    test "again and again", c do
      opts = [source: @model, format: :int4]
      {:ok, _} = run([to: c.calm] ++ opts)
      interrupt!([to: c.to] ++ opts, 4)
      for _ <- 1..3, do: interrupt!([to: c.to, resume: true] ++ opts, 4)
      {again, {:ok, _}} = units_done(fn -> resume(c.to) end)
      assert length(again) == 4
      assert digests(c.to) == digests(c.calm)
    end

    test "in a layout whose shards have late tensors or are one file", c do
      for {opts, n} <- [{[format: :nf4, double_quant: true], 1}, {[format: :q4_k], 2}] do
        c = %{c | calm: "#{c.calm}#{n}", to: "#{c.to}#{n}"}
        assert_resumed(c, [source: @model] ++ opts, 9)
      end
    end

    test "while it converted", c do
      source = Path.join(c.dir, "nf4")
      {:ok, _} = run(source: @model, to: source, format: :nf4)
      {_, again, _} = assert_resumed(c, [source: source, convert: :plain], 5)
      assert length(again) == 15
    end

    test "while it used statistics, from a file or in memory", c do
      file = "examples/calibration/viva-tiny.safetensors"
      only = "^(?!.*1\\.(self_attn\\.o|mlp\\.up)_proj)"
      opts = [source: @model, recipe: :awq_gptq, exclude: only]
      assert_resumed(c, [statistics: file] ++ opts, 18)

      to = c.to <> "-in-memory"
      interrupt!([to: to, statistics: Calibration.load!(file)] ++ opts, 18)
      assert {:error, %Error{reason: {:invalid_option, %{option: "statistics"}}}} = resume(to)
      assert {:ok, _} = resume(to, statistics: Calibration.load!(file))
      assert digests(to) == digests(c.calm)
    end

    test "with scales that were chosen before, if their weights are what they were", c do
      source = Path.join(c.dir, "source")
      File.cp_r!(@model, source)
      only = "^(?!.*1\\.mlp\\.)"
      seen = Path.join(c.dir, "seen.safetensors")
      statistics!(seen, "model.layers.1.mlp.", gate_proj: 256, up_proj: 256, down_proj: 512)
      opts = [source: source, recipe: :awq_gptq, statistics: seen, exclude: only]
      {:ok, calm} = run([to: c.calm] ++ opts)
      assert Enum.count(calm.tensors, &((&1.reason || "") =~ "divided by scales")) > 0
      interrupt!([to: c.to] ++ opts, 1)

      file = Path.join(source, "model.safetensors")
      content = File.read!(file)
      {_, _, bytes} = Safetensors.read!(file)["model.layers.1.mlp.up_proj.weight"]
      {at, _} = :binary.match(content, bytes)
      File.write!(file, Faults.flip(content, at))
      assert {:error, %Error{op: :source, reason: {:changed, _}} = error} = resume(c.to)
      assert error.message =~ "model.layers.1.mlp.up_proj.weight"
      assert error.message =~ "shares its scales"

      File.write!(file, content)
      assert {:ok, report} = resume(c.to)
      assert digests(c.to) == digests(c.calm)
      assert figures(report) == figures(calm)
    end

    test "while a shard was written again without a weight", c do
      source = weights(Path.join(c.dir, "in/model.safetensors"), poison: :nan)
      opts = [source: source, format: :nf4, non_finite: :keep]
      {:ok, calm} = run([to: c.calm] ++ opts)

      # Four units, one of which is only noted, and then four again.
      for count <- 1..7 do
        interrupt!([to: c.to] ++ opts, count)
        assert {again, {:ok, report}} = units_done(fn -> resume(c.to) end)
        assert length(again) <= 8 - count
        assert digests(c.to) == digests(c.calm)
        assert figures(report) == figures(calm)
        File.rm_rf!(c.to)
      end
    end
  end

  describe "a job that was cancelled" do
    test "keeps what it finished, the units that were under way too", c do
      {:ok, _} = run(source: @model, to: c.calm, format: :nf4)
      job = held!([source: @model, to: c.to, format: :nf4], 3)

      assert_receive {:holding, worker, _}
      cancelled = Task.async(fn -> Job.cancel(job) end)
      wait_until(fn -> match?({:stopping, _}, :sys.get_state(job)) end)
      send(worker, :go)
      assert {:error, %Error{reason: {:cancelled, _}}} = Task.await(cancelled, :infinity)
      {:ok, records, _} = Manifest.read(manifest(c.to))
      assert Enum.count(records, &match?({:unit, _, _, _}, &1)) == 3

      assert {again, {:ok, %Report{}}} =
               units_done(fn -> release_while(fn -> resume(c.to) end) end)

      assert length(again) == 17
      assert digests(c.to) == digests(c.calm)
    end
  end

  describe "what is left of a job" do
    test "is neither overwritten nor forgotten by accident", c do
      opts = [source: @model, to: c.to, format: :nf4]
      interrupt!(opts, 3)

      assert {:error, %Error{op: :output, reason: {:unfinished, %{path: path}}} = error} =
               run(opts)

      assert path == partial(c.to)
      assert error.message =~ "--resume" and error.message =~ "--force"

      {again, {:ok, _}} = units_done(fn -> run([force: true] ++ opts) end)
      assert length(again) == 20
      assert names(c.dir) == ["out"]
    end

    test "is one job's at a time", c do
      hold_units()
      job = start!(source: @model, to: c.to, format: :nf4)
      assert_receive {:holding, _, _} = first
      opts = [source: @model, to: c.to, format: :nf4]

      for more <- [[], [force: true], [resume: true]] do
        assert {:error, %Error{op: :output, reason: {:io, %{code: "ebusy"}}}} = run(more ++ opts)
      end

      send(self(), first)
      release_while(fn -> Job.cancel(job) end)
    end

    test "replaces what was there only at the end", c do
      File.mkdir_p!(c.to)
      File.write!(Path.join(c.to, "old"), "")
      interrupt!([source: @model, to: c.to, format: :nf4, force: true], 5)
      assert names(c.to) == ["old"]
      {again, {:ok, _}} = units_done(fn -> resume(c.to) end)
      assert length(again) == 15
      assert "model.safetensors" in names(c.to) and "old" not in names(c.to)
      assert names(c.dir) == ["out"]
    end

    test "is done again where it is damaged", c do
      opts = [source: @model, format: :int8, max_concurrency: 1]
      {:ok, _} = run([to: c.calm] ++ opts)
      interrupt!([to: c.to] ++ opts, 10)
      {:ok, records, _} = Manifest.read(manifest(c.to))
      units = for {:unit, _, name, %{row: row}} <- records, do: {name, row.output_bytes}

      # A byte in the middle of the largest tensor that is there.
      {name, _} = Enum.max_by(units, &elem(&1, 1))
      {_, _, bytes} = c.calm |> Safetensors.read!() |> Map.fetch!(name)
      shard = Path.join(partial(c.to), "shard-0")
      content = File.read!(shard)
      {at, length} = :binary.match(content, bytes)
      File.write!(shard, flip(content, at + div(length, 2)))

      {again, {:ok, _}} = units_done(fn -> resume(c.to, notify: self()) end)
      assert name in again and length(again) == 11
      assert_received {:viva_tensor_job, _, {:redo, %{name: ^name}}}
      assert digests(c.to) == digests(c.calm)
    end

    test "is done again where a shard is gone, cut or the manifest is torn", c do
      opts = [source: @model, format: :nf4]
      {:ok, _} = run([to: c.calm] ++ opts)
      shard = Path.join(partial(c.to), "shard-0")

      damages = [
        {fn -> File.rm!(shard) end, 20},
        {fn -> cut(shard, div(File.stat!(shard).size, 2)) end, 10..20},
        {fn -> cut(manifest(c.to), File.stat!(manifest(c.to)).size - 3) end, 11},
        {fn -> File.write!(manifest(c.to), "garbage, torn", [:append]) end, 10},
        {fn -> cut(manifest(c.to), 10) end, 20}
      ]

      for {damage, expected} <- damages do
        interrupt!([to: c.to] ++ opts, 10)
        damage.()
        {again, {:ok, _}} = units_done(fn -> run([to: c.to, resume: true] ++ opts) end)
        if is_integer(expected), do: assert(length(again) == expected)
        assert digests(c.to) == digests(c.calm)
        File.rm_rf!(c.to)
      end
    end

    test "of another version is refused", c do
      interrupt!([source: @model, to: c.to, format: :nf4], 3)
      File.write!(manifest(c.to), "viva_tensor manifest 9\nsomething")
      assert {:error, %Error{reason: {:invalid_file, _}} = error} = Job.resume(c.to)
      assert error.message =~ "--force"
    end
  end

  defp cut(path, size), do: File.write!(path, binary_part(File.read!(path), 0, size))

  describe "an output that is complete" do
    test "is left as it is where the same is asked for again", c do
      for opts <- [[format: :nf4, double_quant: true], [format: :q4_k]] do
        to = "#{c.to}-#{opts[:format]}"
        opts = [source: @model, to: to] ++ opts
        {:ok, first} = run(opts)
        {again, {:ok, second}} = units_done(fn -> run([resume: true] ++ opts) end)
        assert again == []
        assert second == first

        assert {:error, %Error{reason: {:io, %{code: "eexist"}}}} =
                 run([resume: true, min_elements: 1] ++ opts)

        assert {:error, %Error{reason: {:io, %{code: "eexist"}}}} = run(opts)
      end

      to = c.to <> "-plain"
      {:ok, first} = run(source: c.to <> "-nf4", to: to, convert: :plain)
      assert run(source: c.to <> "-nf4", to: to, convert: :plain, resume: true) == {:ok, first}
    end
  end

  describe "what was interrupted at the very end" do
    # The names are given, and the report says that all is there.
    defp stop_before_the_end(c, opts) do
      {:ok, _} = run([to: c.calm] ++ opts)
      # A target that someone fills meanwhile stops a job that is about to appear.
      id = hold_units()
      job = start!([to: c.to] ++ opts)
      assert_receive {:holding, _, _} = first
      File.mkdir_p!(c.to)
      File.write!(Path.join(c.to, "theirs"), "")
      send(self(), first)
      assert {:error, %Error{op: :output} = error} = release_while(fn -> Job.await(job) end)
      assert error.message =~ partial(c.to)
      Telemetry.detach(id)
      File.rm_rf!(c.to)
    end

    test "is gone on with after the shards were named", c do
      opts = [source: @model, format: :nf4, max_shard_size: 500_000]
      stop_before_the_end(c, opts)
      assert "model-00001-of-00003.safetensors" in names(partial(c.to))
      {again, {:ok, _}} = units_done(fn -> resume(c.to) end)
      assert again == []
      assert digests(c.to) == digests(c.calm)
    end

    test "is cleaned up after the output appeared", c do
      opts = [source: @model, format: :nf4]
      stop_before_the_end(c, opts)
      File.rename!(partial(c.to), c.to)
      assert {:ok, report} = resume(c.to)
      assert length(report.tensors) == 20
      assert digests(c.to) == digests(c.calm)
      assert names(c.dir) == ["calm", "out"]

      # Without a word of going on it is there like any other.
      File.rm_rf!(c.to)
      stop_before_the_end(%{c | calm: c.calm <> "2"}, opts)
      File.rename!(partial(c.to), c.to)
      assert {:error, %Error{reason: {:io, %{code: "eexist"}}}} = run([to: c.to] ++ opts)
      assert digests(c.to) == digests(c.calm)
    end
  end

  describe "a source or recipe that changed" do
    setup c do
      source = Path.join(c.dir, "model")
      File.cp_r!(@model, source)
      Map.put(c, :source, source)
    end

    defp refused(c, opts \\ []) do
      assert {:error, %Error{reason: {:changed, %{changes: changes}}} = error} =
               [source: c.source, to: c.to, format: :int4, resume: true]
               |> Keyword.merge(opts)
               |> run()

      assert error.message =~ "cannot be gone on with" and error.message =~ "--force"
      # It is still there.
      assert File.exists?(manifest(c.to))
      {error, changes}
    end

    test "is refused, and the error says what it was", c do
      interrupt!([source: c.source, to: c.to, format: :int4], 4)

      for {opts, what, how} <- [
            {[block_size: 64], "block_size", "was 128 and is 64"},
            {[layout: :mlx], "layout", "was awq and is mlx"},
            {[format: :nf4], "format", "was int4 and is nf4"},
            {[exclude: "down"], "exclude", "was [] and is ~r/down/"},
            {[max_shard_size: "1MB"], "max_shard_size", "was 5.00 GB and is 1.00 MB"}
          ] do
        {error, changes} = refused(c, opts)
        assert error.op == :recipe
        assert %{what: what, how: how} in changes
      end

      # How it runs may be other.
      assert {:ok, _} = resume(c.to, max_concurrency: 3, memory_limit: "1MB")
    end

    test "is refused where a tensor has other values", c do
      interrupt!([source: c.source, to: c.to, format: :int4], 4)
      weights = Path.join(c.source, "model.safetensors")
      content = File.read!(weights)
      {:ok, records, _} = Manifest.read(manifest(c.to))
      [name | _] = for {:unit, _, name, _} <- records, do: name
      {_, _, bytes} = Safetensors.read!(weights)[name]
      {at, _} = :binary.match(content, bytes)

      # In place, with the old time put back.
      stat = File.stat!(weights)
      File.write!(weights, flip(content, at + 1))
      File.touch!(weights, stat.mtime)
      {error, changes} = refused(c)
      assert error.op == :source
      assert changes == [%{what: name, how: "has other values"}]

      Safetensors.write!(weights, [{"other.weight", "F32", [1], <<0::32>>}])
      {_, changes} = refused(c)
      size = File.stat!(weights).size
      assert [%{how: how}] = changes
      assert how == "had #{byte_size(content)} bytes and has #{size}"

      # The same content, in other files.
      File.write!(weights, content)
      assert {:ok, _} = resume(c.to)
    end

    test "is refused where another tensor, other files or another config decide", c do
      interrupt!([source: c.source, to: c.to, format: :int4], 4)
      config = Path.join(c.source, "config.json")
      {:ok, was} = config |> File.read!() |> Native.json_decode()
      {:ok, gpt2} = Native.json_encode(%{was | "model_type" => "gpt2"}, true)
      File.write!(config, gpt2)
      {_, changes} = refused(c)
      assert [%{what: "config.json"}] = changes

      weights = Path.join(c.source, "model.safetensors")
      File.rename!(weights, Path.join(c.source, "other.safetensors"))
      {_, changes} = refused(c)
      assert %{what: "model.safetensors", how: "is gone"} in changes
    end

    test "is not published when it changes while it is read", c do
      hold_units()
      job = start!(source: c.source, to: c.to, format: :int4)
      assert_receive {:holding, _, _} = first
      File.touch!(Path.join(c.source, "model.safetensors"))
      send(self(), first)
      assert {:error, %Error{op: :source} = error} = release_while(fn -> Job.await(job) end)
      assert error.message =~ "was changed while it was read"
      refute File.exists?(c.to)
      # Nothing but the time did, as is found now.
      assert {:ok, _} = release_while(fn -> resume(c.to) end)
    end
  end

  describe "weights that were put aside" do
    test "are tried again, or kept", c do
      source = weights(Path.join(c.dir, "in/model.safetensors"), poison: :inf)
      opts = [source: source, format: :nf4]
      {:ok, _} = run([to: c.calm, non_finite: :keep] ++ opts)
      assert {:partial, first} = run([to: c.to] ++ opts)
      {[], {:partial, second}} = units_done(fn -> resume(c.to) end)
      assert first.quarantined == second.quarantined and figures(first) == figures(second)

      {_, {:ok, report}} = units_done(fn -> resume(c.to, non_finite: :keep) end)
      assert row(report, "layers.0.down.weight").action == :keep
      assert digests(c.to) == digests(c.calm)
    end
  end
end
