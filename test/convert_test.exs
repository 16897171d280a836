defmodule VivaTensor.ConvertTest do
  use ExUnit.Case, async: true

  alias VivaTensor.{Checkpoint, Conversion, Error, Job, Native, Quantized, Report, Tensor}
  alias VivaTensor.Test.{Directory, Safetensors}

  doctest VivaTensor.Conversion

  @model "examples/models/viva-tiny"
  @weight "model.layers.0.self_attn.q_proj.weight"
  @kept "model.layers.1.mlp.down_proj.weight"
  @norm "model.norm.weight"

  # Enough to see queries, keys and rows of two lengths.
  @some "layers\\.1|gate_proj|up_proj|o_proj|v_proj"

  # One source in every layout: its job's options.
  @sources [
    bitsandbytes: [format: :nf4, double_quant: true],
    awq: [format: :int4],
    compressed_tensors: [format: :int4],
    gptq: [format: :int4, symmetric: true],
    gptq_v2: [format: :int3],
    mlx: [format: :int4, block_size: 32],
    gguf: [format: :q4_0]
  ]
  @layouts Keyword.keys(@sources)

  # What has to be lossless, from source to target, beside a layout to itself.
  @lossless [
    awq: [:gptq, :gptq_v2, :compressed_tensors, :mlx, :gguf],
    compressed_tensors: [:awq, :gptq, :gptq_v2, :mlx, :gguf],
    gptq: [:gptq_v2, :awq, :compressed_tensors, :mlx, :gguf],
    gptq_v2: [:gptq, :awq, :compressed_tensors, :mlx, :gguf],
    mlx: [:gguf],
    gguf: [:awq, :gptq, :gptq_v2, :compressed_tensors, :mlx]
  ]

  setup do
    {:ok, dir: Directory.create!()}
  end

  defp source!(dir, layout, options \\ []) do
    to = Path.join(dir, "from-#{layout}")
    own = Keyword.merge(Keyword.fetch!(@sources, layout), options)
    {:ok, _} = run([source: @model, to: to, layout: layout, exclude: @some] ++ own)
    to
  end

  defp run(options) do
    {:ok, job} = Job.start(options)
    Job.await(job)
  end

  defp convert!(source, to, layout, options \\ []) do
    {:ok, report} = run([source: source, to: to, convert: layout] ++ options)
    report
  end

  defp values(%Quantized{} = q), do: values(VivaTensor.dequantize!(q, dtype: :f32))
  defp values(%Tensor{} = t), do: t |> Tensor.cast!(:f32) |> Tensor.to_binary!()

  # Equal numbers: zeros of both signs are one.
  defp same?(a, b), do: floats(a) == floats(b)
  defp floats(bytes), do: for(<<v::little-float-32 <- bytes>>, do: v + 0.0)

  defp read(dir, name \\ @weight), do: dir |> Checkpoint.open!() |> Checkpoint.get!(name)

  defp row(report, name), do: Enum.find(report.tensors, &(&1.name == name))

  for layout <- @layouts do
    # Out of the context, where newer compilers do not take it for one constant.
    @tag layout: layout
    test "from #{layout} to every other, and refused by a job that quantizes",
         %{dir: dir, layout: layout} do
      source = source!(dir, layout)
      # One weight by its name, whatever spells it.
      assert %Quantized{shape: [256, 256]} = q = read(source)
      before = values(q)

      for target <- @layouts do
        to = Path.join(dir, "to-#{target}")
        report = convert!(source, to, target)
        assert %Quantized{} = made = read(to)
        converted = Enum.filter(report.tensors, &(&1.action == :convert and &1.quantized))
        assert length(converted) == 3

        name = if target == layout and layout == :gguf, do: "blk.0.attn_q.weight", else: @weight
        row = row(report, name)
        assert row.format == made.format
        assert row.lossless == same?(before, values(made))
        assert row.lossless == (row.changed == 0)

        if target == layout or target in Keyword.get(@lossless, layout, []) do
          assert Enum.all?(converted, & &1.lossless), "#{layout} to #{target}"
        else
          assert row.lossless or row.sqnr_db > 19
        end

        # What was not quantized is still what it was.
        assert values(read(to, @kept)) == values(read(@model, @kept))
        assert values(read(to, @norm)) == values(read(@model, @norm))
        config = Checkpoint.open!(to).config
        assert Map.has_key?(config, "quantization_config") == (target != :gguf)
      end

      assert {:error, %Error{op: :source, reason: {:already_quantized, _}} = error} =
               run(source: source, to: Path.join(dir, "no"), format: :nf4)

      assert Exception.message(error) =~ "mix viva.convert"
    end

    @tag layout: layout
    test "from #{layout} to plain floats", %{dir: dir, layout: layout} do
      source = source!(dir, layout)
      to = Path.join(dir, "plain")
      report = convert!(source, to, :plain, dtype: :f32)
      assert Enum.all?(report.tensors, &(&1.action == :keep or &1.lossless))
      written = Safetensors.read!(to)

      names = Safetensors.read!(@model) |> Map.keys() |> Enum.sort()
      assert written |> Map.keys() |> Enum.sort() == names
      assert Enum.all?(written, fn {_, {dtype, _, _}} -> dtype == "F32" end)

      for name <- [@weight, @norm],
          do: assert(values(read(to, name)) == values(read(source, name)))

      {:ok, config} = to |> Path.join("config.json") |> File.read!() |> Native.json_decode()
      refute Map.has_key?(config, "quantization_config")
      refute Map.has_key?(config, "quantization")
      assert config["dtype"] == "float32"
      files = File.ls!(to)
      refute "quantize_config.json" in files
      assert "tokenizer.json" in files

      # Rounded, and told so.
      half = Path.join(dir, "half")
      report = convert!(source, half, :plain, dtype: :bf16)
      row = row(report, @weight)
      assert row.format == :bf16
      expected = source |> read() |> VivaTensor.dequantize!(dtype: :bf16)
      assert values(read(half)) == values(expected)
      assert row.lossless == same?(values(read(source)), values(expected))
      assert row.lossless or (row.changed > 0 and row.sqnr_db > 50 and row.max_error > 0)
    end
  end

  test "a GGUF file is the same after a detour", %{dir: dir} do
    for format <- [:q4_0, :q4_1, :q5_0, :q5_1, :q8_0] do
      first = source!(dir, :gguf, format: format, force: true)
      by = Path.join(dir, "mlx")
      convert!(first, by, :mlx, force: true)
      back = Path.join(dir, "back")
      report = convert!(by, back, :gguf, force: true)
      assert Enum.all?(report.tensors, &(&1.action == :keep or &1.lossless))

      [first, back] = Enum.map([first, back], &Checkpoint.open!/1)
      entries = fn ckpt -> Enum.sort(for e <- ckpt.entries, do: {e.name, e.dtype, e.shape}) end
      assert entries.(first) == entries.(back)

      for %{name: name} <- first.entries do
        assert bytes(first, name) == bytes(back, name)
      end
    end
  end

  defp bytes(ckpt, name) do
    case Checkpoint.get!(ckpt, name) do
      %Quantized{} = q -> Quantized.dump!(q)
      %Tensor{} = t -> Tensor.to_binary!(t)
    end
  end

  test "the tokenizer and the config of a GGUF file are told again", %{dir: dir} do
    to = Path.join(dir, "plain")
    dir |> source!(:gguf) |> convert!(to, :plain)
    decode = fn path -> path |> File.read!() |> Native.json_decode() |> elem(1) end
    [ours, theirs] = for d <- [to, @model], do: decode.(Path.join(d, "tokenizer.json"))
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]

    text = fn
      [a, b] -> "#{a} #{b}"
      merge -> merge
    end

    assert Enum.map(ours["model"]["merges"], text) == Enum.map(theirs["model"]["merges"], text)

    assert Enum.map(ours["added_tokens"], & &1["id"]) ==
             Enum.map(theirs["added_tokens"], & &1["id"])

    [ours, theirs] = for d <- [to, @model], do: decode.(Path.join(d, "config.json"))

    for key <- ~w(hidden_size num_hidden_layers num_attention_heads vocab_size rms_norm_eps),
        do: assert(ours[key] == theirs[key])

    assert ours["dtype"] == "float32"
    # Loaders of bitsandbytes leave floats as they are: all are of one dtype.
    bnb = Path.join(dir, "bnb")
    dir |> Path.join("from-gguf") |> convert!(bnb, :bitsandbytes)
    dtypes = for {_, {dtype, [_, _], _}} <- Safetensors.read!(bnb), do: dtype
    assert Checkpoint.open!(bnb).config["dtype"] == "float32"
    assert "F32" in dtypes and "BF16" not in dtypes
  end

  test "what a file inverts is compared as it will be read", %{dir: dir} do
    for format <- [:nvfp4, :mxfp4],
        {from, to} <- [compressed_tensors: :gguf, gguf: :compressed_tensors] do
      source = source!(dir, from, format: format, force: true)
      target = Path.join(dir, "out")
      report = convert!(source, target, to, force: true)

      for %{name: name, quantized: true} = row <- report.tensors do
        assert row.format == format
        assert row.lossless == same?(values(read(source, name)), values(read(target, name)))
        assert row.lossless or row.sqnr_db > 120
      end
    end
  end

  test "weights of several formats", %{dir: dir} do
    model = Path.join(dir, "model")
    [up, down] = for m <- ~w(up down), do: "model.layers.0.mlp.#{m}_proj"

    Safetensors.write!(Path.join(model, "model.safetensors"), [
      {up <> ".weight", "F32", [64, 96], Safetensors.normal(64 * 96, 1)},
      {down <> ".weight", "F32", [128, 256], Safetensors.normal(128 * 256, 2)}
    ])

    for file <- ["config.json", "tokenizer.json"],
        do: File.cp!(Path.join(@model, file), Path.join(model, file))

    # Rows of 96 are of shorter blocks: q5_0.
    source = Path.join(dir, "source")
    {:ok, _} = run(source: model, to: source, format: :q4_k)

    formats = fn target ->
      to = Path.join(dir, "to-#{target}")
      report = convert!(source, to, target)

      for module <- [up, down] do
        made = read(to, module <> ".weight")
        row = row(report, module <> ".weight")
        assert row.lossless == same?(values(read(source, row.name)), values(made))
        assert row.lossless or row.sqnr_db > 19
      end

      {for(module <- [up, down], do: row(report, module <> ".weight").format),
       Checkpoint.open!(to).config["quantization_config"]}
    end

    # Where each module has settings of its own, and where one is for all.
    assert {[:int5, :int4], config} = formats.(:mlx)
    assert %{"bits" => 4, ^up => %{"bits" => 5, "group_size" => 32}} = config
    assert {[:int8, :int4], config} = formats.(:gptq)
    assert %{"bits" => 8} = config["dynamic"]["+:^" <> String.replace(up, ".", "\\.") <> "$"]
    assert {[:int5, :int4], config} = formats.(:compressed_tensors)
    assert %{"format" => "pack-quantized", "config_groups" => groups} = config
    assert %{"targets" => [^up], "weights" => %{"num_bits" => 5}} = groups["group_1"]
    assert {[:int4, :int4], %{"bits" => 4}} = formats.(:awq)
    assert {[:nf4, :nf4], %{"load_in_4bit" => true}} = formats.(:bitsandbytes)
  end

  test "a model that is not quantized stays so", %{dir: dir} do
    for target <- [:gptq, :plain] do
      to = Path.join(dir, "out-#{target}")
      report = convert!(@model, to, target)
      assert Enum.all?(report.tensors, &(&1.action == :keep))
      assert Safetensors.read!(to) == Safetensors.read!(@model)
      refute Map.has_key?(Checkpoint.open!(to).config, "quantization_config")
    end
  end

  test "integers and unknown dtypes are never cast", %{dir: dir} do
    source = Path.join(dir, "in")

    Safetensors.write!(Path.join(source, "model.safetensors"), [
      {"a.weight", "F32", [2, 2], Safetensors.normal(4, 1)},
      {"b.positions", "I64", [2], <<1::little-64, 2::little-64>>},
      {"c.mask", "BOOL", [3], <<1, 0, 1>>}
    ])

    to = Path.join(dir, "out")
    report = convert!(source, to, :plain, dtype: :bf16)
    assert %{"a.weight" => {"BF16", [2, 2], _}} = written = Safetensors.read!(to)

    for name <- ["b.positions", "c.mask"],
        do: assert(written[name] == Safetensors.read!(source)[name])

    assert %{action: :convert, lossless: false, changed: 4} = row(report, "a.weight")
    assert %{action: :keep} = row(report, "c.mask")
  end

  test "shards, and a limit of memory", %{dir: dir} do
    source = source!(dir, :awq)
    to = Path.join(dir, "out")
    report = convert!(source, to, :gptq, max_shard_size: "300KB", memory_limit: "1MB")
    assert length(report.files) > 3
    assert File.exists?(Path.join(to, "model.safetensors.index.json"))
    assert values(read(to)) == values(read(source))
  end

  test "a report as data", %{dir: dir} do
    report = dir |> source!(:awq) |> convert!(Path.join(dir, "out"), :mlx)
    assert report.lossless == report.quantized
    data = Report.to_map(report)
    assert data.recipe == %{layout: :mlx, dtype: nil}
    assert {:ok, _} = Native.json_encode(data, true)
    table = Report.table(report, tensors: true)
    assert table =~ ~r/q_proj.weight +1 +awq int4 +256x256 +int4 .* lossless/
    assert table =~ "lossless   3 tensors"
  end

  test "options of a conversion go through the job" do
    assert {:ok, %Conversion{layout: :"compressed-tensors", dtype: :bf16}} =
             Conversion.new(layout: "compressed_tensors", dtype: "bf16")

    assert {:error, %Error{}} = Job.start(source: "a", to: "b", convert: :mlx, format: :nf4)
    {:ok, conversion} = Conversion.new(layout: :mlx)
    assert {:error, _} = Job.start(source: "a", to: "b", recipe: conversion, dtype: :f16)
    assert {:error, _} = Conversion.new(dtype: :f16)
  end
end
