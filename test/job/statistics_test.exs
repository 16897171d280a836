defmodule VivaTensor.Job.StatisticsTest do
  # Whole models, quantized by what their layers met in real text.
  use ExUnit.Case, async: false

  alias VivaTensor.{Calibration, Checkpoint, Error, Job, Quantized, Report, Tensor}
  alias VivaTensor.Test.{Directory, Safetensors}

  @model "examples/models/viva-tiny"
  @layer "model.layers.1"
  # The sample is of some layers: the others stay as they are.
  @kept ["layers\\.0\\.", "down_proj"]

  setup_all do
    sample = Calibration.load!("examples/calibration/viva-tiny.safetensors")
    unseen = Calibration.load!("examples/calibration/viva-tiny-held-out.safetensors")
    seen = Calibration.new()

    # Weights that read the same met the same.
    for {of, layers} <- [
          {"self_attn.q_proj", ~w(self_attn.q_proj self_attn.k_proj self_attn.v_proj)},
          {"self_attn.o_proj", ~w(self_attn.o_proj)},
          {"mlp.up_proj", ~w(mlp.gate_proj mlp.up_proj)}
        ],
        x = Calibration.samples!(sample, "#{@layer}.#{of}"),
        layer <- layers do
      :ok = Calibration.add(seen, "#{@layer}.#{layer}", x)
    end

    %{seen: seen, unseen: unseen, source: Checkpoint.open!(@model)}
  end

  setup do
    {:ok, dir: Directory.create!()}
  end

  defp run(c, name, opts) do
    to = Path.join(c.dir, name)
    opts = Keyword.merge([source: @model, exclude: @kept], opts)

    with {:ok, job} <- Job.start([to: to] ++ opts),
         {:ok, report} <- Job.await(job),
         do: {:ok, report, to}
  end

  defp run!(c, name, opts) do
    {:ok, report, to} = run(c, name, opts)
    {report, to}
  end

  defp row(report, name), do: Enum.find(report.tensors, &(&1.name == "#{@layer}.#{name}.weight"))

  defp floats(checkpoint, name) do
    case Checkpoint.get!(checkpoint, "#{@layer}.#{name}.weight") do
      %Quantized{} = q -> q |> VivaTensor.dequantize!(dtype: :f32) |> Tensor.to_list!()
      %Tensor{} = t -> t |> Tensor.cast!(:f32) |> Tensor.to_list!()
    end
  end

  defp weights(dir), do: File.read!(Path.join(dir, "model.safetensors"))

  # The output error of a weight on unseen rows, whose columns were divided by `scales`.
  defp output_error(c, written, name, of, scales) do
    x = Calibration.samples!(c.unseen, "#{@layer}.#{of}")
    w = Checkpoint.get!(c.source, "#{@layer}.#{name}.weight")
    back = for {v, s} <- Enum.zip(floats(written, name), Stream.cycle(scales)), do: v / s
    VivaTensor.metrics!(w, Tensor.from_list!(back, :f32, w.shape), activations: x).output_error
  end

  test "awq folds its scales into the norms, and the model computes what it did", c do
    {report, to} = run!(c, "awq", recipe: :awq, statistics: c.seen)
    {_, rtn} = run!(c, "rtn", recipe: :int4)
    [awq, rtn] = Enum.map([to, rtn], &Checkpoint.open!/1)

    for {norm, of, readers} <- [
          {"input_layernorm", "self_attn.q_proj",
           ~w(self_attn.q_proj self_attn.k_proj self_attn.v_proj)},
          {"post_attention_layernorm", "mlp.up_proj", ~w(mlp.gate_proj mlp.up_proj)}
        ] do
      scales =
        for {before, after_} <- Enum.zip(floats(c.source, norm), floats(awq, norm)),
            do: before / after_

      assert Enum.max(scales) / Enum.min(scales) > 1.1
      assert row(report, norm).reason == "norm; divided by scales"

      total = fn checkpoint, scales ->
        Enum.sum(for r <- readers, do: output_error(c, checkpoint, r, of, scales))
      end

      assert total.(awq, scales) < total.(rtn, [1.0])

      for reader <- readers do
        assert %{action: :quantize, reason: nil, output_error: error} = row(report, reader)
        assert error < 0.2
      end
    end

    # Two heads of keys and values for four of queries.
    assert row(report, "self_attn.o_proj").reason =~ "not scaled: several of its columns share"
    assert report.statistics == %{file: nil, layers: 6, tokens: 64}
    assert Report.table(report) =~ "statistics in memory: 6 layers, 64 rows each"

    {:ok, json} =
      to |> Path.join("report.json") |> File.read!() |> VivaTensor.Native.json_decode()

    assert json["recipe"]["settings"]["method"] == "awq"
    assert json["recipe"]["statistics"] == "in memory"
    assert json["statistics"]["tokens"] == 64
  end

  test "the same bytes however it runs, from memory or a file, one step at a time or many", c do
    path = Path.join(c.dir, "seen.safetensors")
    :ok = Calibration.save(c.seen, path)

    [first | others] =
      for {statistics, concurrency, n} <- [{c.seen, 4, 1}, {path, 1, 2}, {path, 4, 3}] do
        opts = [recipe: :awq_gptq, statistics: statistics, max_concurrency: concurrency]
        {report, to} = run!(c, "#{n}", opts)
        assert report.statistics.file == if(is_binary(statistics), do: path)
        weights(to)
      end

    for bytes <- others, do: assert(bytes == first)
  end

  test "a worker that dies while scales are chosen is replaced", c do
    {_, to} = run!(c, "calm", recipe: :awq, statistics: c.seen)
    path = Path.join(c.dir, "again")

    {:ok, job} =
      Job.start(
        source: @model,
        to: path,
        exclude: @kept,
        recipe: :awq,
        statistics: c.seen,
        notify: self()
      )

    assert_receive {:viva_tensor_job, ^job, {:planned, _}}
    for pid <- Task.Supervisor.children(VivaTensor.Job.Workers), do: Process.exit(pid, :kill)
    assert {:ok, _report} = Job.await(job)
    assert weights(path) == weights(to)
  end

  test "gptq rounds the codes of its layout, and scales nothing", c do
    opts = [recipe: :gptq, exclude: @kept ++ ["k_proj", "v_proj", "gate_proj"]]
    path = "examples/calibration/viva-tiny.safetensors"
    {report, to} = run!(c, "gptq", opts ++ [statistics: path])
    {_, rtn} = run!(c, "rtn", opts ++ [method: :rtn])
    assert report.statistics == %{file: path, layers: 3, tokens: 16_448}
    [gptq, rtn] = Enum.map([to, rtn], &Checkpoint.open!/1)
    assert floats(gptq, "input_layernorm") == floats(c.source, "input_layernorm")

    for layer <- ~w(self_attn.q_proj self_attn.o_proj mlp.up_proj) do
      assert row(report, layer).reason == nil

      [ours, theirs] =
        for written <- [gptq, rtn], do: output_error(c, written, layer, layer, [1.0])

      assert ours < theirs
    end
  end

  test "layers without statistics are named before anything is written", c do
    assert {:error,
            %Error{op: :statistics, reason: {:missing_statistics, %{layers: missing}}} = e} =
             run(c, "out", recipe: :awq, statistics: c.seen, exclude: ["layers\\.0\\."])

    assert missing == ["#{@layer}.mlp.down_proj"]
    assert e.message =~ "exclude"

    other = Calibration.new()
    x = Tensor.from_list!(List.duplicate(1.0, 64), :f32, [2, 32])
    layers = for %{name: name} <- Calibration.layers(c.seen), do: name
    for layer <- layers, do: :ok = Calibration.add(other, layer, x)

    assert {:error, %Error{reason: {:size_mismatch, %{expected: 256, actual: 32}}}} =
             run(c, "out", recipe: :awq, statistics: other)

    assert {:error, %Error{op: :statistics, reason: {:io, _}}} =
             run(c, "out", recipe: :awq, statistics: "no/such/file.safetensors")

    assert {:error, %Error{reason: {:invalid_option, %{option: "statistics"}}} = error} =
             run(c, "out", recipe: :awq)

    assert error.message =~ "record.py"

    assert {:error, %Error{reason: {:invalid_option, %{option: "exclude"}}}} =
             run(c, "out", recipe: VivaTensor.Recipe.new!(:awq), statistics: c.seen)

    assert File.ls!(c.dir) == []
  end

  test "a weight that is not finite takes the scales of its group with it", c do
    path = Path.join([c.dir, "model", "model.safetensors"])

    tensors =
      for {name, {dtype, shape, bytes}} <- Safetensors.read!(@model) do
        # A NaN of bf16.
        bytes =
          if name == "#{@layer}.self_attn.k_proj.weight",
            do: <<0xC0, 0x7F>> <> binary_part(bytes, 2, byte_size(bytes) - 2),
            else: bytes

        {name, dtype, shape, bytes}
      end

    Safetensors.write!(path, tensors)
    File.cp!(Path.join(@model, "config.json"), Path.join([c.dir, "model", "config.json"]))
    opts = [recipe: :awq, statistics: c.seen, source: Path.dirname(path)]
    assert {:partial, %{quarantined: [%{name: name}]}} = run(c, "strict", opts)
    assert name == "#{@layer}.self_attn.k_proj.weight"
    {report, to} = run!(c, "kept", opts ++ [non_finite: :keep])
    assert row(report, "self_attn.k_proj").action == :keep
    assert row(report, "self_attn.q_proj").reason =~ "not finite"
    assert row(report, "mlp.gate_proj").reason == nil
    written = Checkpoint.open!(to)
    assert floats(written, "input_layernorm") == floats(c.source, "input_layernorm")

    refute floats(written, "post_attention_layernorm") ==
             floats(c.source, "post_attention_layernorm")
  end
end
