defmodule VivaTensor.MixTasksTest do
  # The tasks write to standard output and standard error.
  use ExUnit.Case, async: false

  alias Mix.Tasks.Viva.{Inspect, Quantize}
  alias VivaTensor.{Checkpoint, Native, Tensor, Test}
  alias VivaTensor.Test.{Directory, Safetensors}

  @model "examples/models/viva-tiny"

  setup do
    {:ok, dir: Directory.create!()}
  end

  defp task(module, argv), do: Test.Task.run(module, argv)

  defp decode!(json) do
    {:ok, term} = Native.json_decode(json)
    term
  end

  defp values(quantized) do
    quantized |> VivaTensor.dequantize!(dtype: :f32) |> Tensor.to_binary!()
  end

  describe "mix viva.quantize" do
    test "compresses, reports and exits with 0", %{dir: dir} do
      to = Path.join(dir, "out")
      argv = [@model, "--to", to, "--format", "nf4", "--double-quant", "--memory-limit", "64MB"]
      assert {0, stdout, stderr} = task(Quantize, argv)

      assert stdout =~ "#{@model} -> #{to}: nf4 in bitsandbytes layout"
      assert stdout =~ "model.layers.*.mlp.up_proj.weight"
      assert stdout =~ "quantized  14 tensors"
      assert stdout =~ "SQNR"
      refute stderr =~ "\e["

      report = to |> Path.join("report.json") |> File.read!() |> decode!()
      assert report["recipe"]["settings"]["double_quant"] == true
      assert report["quantized"] == 14
      assert File.exists?(Path.join(to, "model.safetensors"))
    end

    test "writes a whole model as one GGUF file", %{dir: dir} do
      to = Path.join(dir, "out")
      argv = [@model, "--to", to, "--format", "q4_k", "--max-shard-size", "100KB"]
      assert {0, stdout, _} = task(Quantize, argv)
      assert stdout =~ "q4_k in gguf layout"
      assert to |> File.ls!() |> Enum.sort() == ["model.gguf", "report.html", "report.json"]

      source = Checkpoint.open!(@model)
      written = Checkpoint.open!(to)
      assert written.config["tie_word_embeddings"] == true
      name = "model.layers.1.self_attn.k_proj.weight"
      direct = VivaTensor.quantize!(Checkpoint.get!(source, name), :q4_k)
      read = Checkpoint.get!(written, name)
      assert values(read) == values(direct)
      assert values(Checkpoint.get!(written, "blk.1.attn_k.weight")) != values(direct)

      assert {0, stdout, _} = task(Inspect, [to])
      assert stdout =~ ~r/blk\.0\.attn_q\.weight +q4_k +gguf +256x256/

      # What it holds is quantized already.
      assert {3, "", stderr} = task(Quantize, [to, "--to", to <> "2", "--format", "q4_0"])
      assert stderr =~ "quantized already (q4_k in gguf layout)"
    end

    test "takes a shorter block where rows need one, and says so", %{dir: dir} do
      model = Path.join(dir, "model")
      File.mkdir_p!(model)

      for file <- ["config.json", "tokenizer.json"],
          do: File.cp!(Path.join(@model, file), Path.join(model, file))

      Safetensors.write!(Path.join(model, "model.safetensors"), [
        {"model.layers.0.mlp.up_proj.weight", "F32", [64, 96], Safetensors.normal(64 * 96, 1)},
        {"model.layers.0.mlp.down_proj.weight", "F32", [24, 256], Safetensors.normal(24 * 256, 2)}
      ])

      to = Path.join(dir, "out")
      assert {0, stdout, _} = task(Quantize, [model, "--to", to, "--format", "q4_k"])
      assert stdout =~ "q5_0: q4_k does not divide its rows"
      report = to |> Path.join("report.json") |> File.read!() |> decode!()

      assert [
               %{"format" => "q5_0", "reason" => "q4_k does not divide its rows"},
               %{"format" => "q4_k", "reason" => nil}
             ] = Enum.sort_by(report["tensors"], & &1["format"], :desc)
    end

    test "says what a GGUF file needs", %{dir: dir} do
      file = Path.join(dir, "bare.safetensors")
      Safetensors.write!(file, [{"a.weight", "F32", [1, 32], Safetensors.normal(32, 1)}])
      argv = [file, "--to", Path.join(dir, "out"), "--format", "q8_0", "--layout", "gguf"]
      assert {3, "", stderr} = task(Quantize, argv)
      assert stderr =~ "has no config.json"
    end

    test "takes a recipe by name, and what it looks at", %{dir: dir} do
      to = Path.join(dir, "out")
      seen = "examples/calibration/viva-tiny.safetensors"
      only = ["--exclude", "^(?!.*1\\.(self_attn\\.o|mlp\\.up)_proj)"]
      how = ["--scales", "mse", "--duo-scaling", "both"]
      argv = [@model, "--to", to, "--recipe", "awq_gptq", "--statistics", seen]
      assert {0, stdout, _} = task(Quantize, argv ++ how ++ only)
      assert stdout =~ "int4 in awq layout, block_size 128, method awq_gptq"
      assert stdout =~ "int4: not scaled: mlp.gate_proj, which reads the same, is kept"
      assert stdout =~ "statistics #{seen}: 2 layers, 16448 rows each"

      argv = [@model, "--to", to, "--force", "--recipe", "gptq"]
      assert {2, _, stderr} = task(Quantize, argv)
      assert stderr =~ "option statistics: method gptq looks at what the layers"
      assert {3, _, stderr} = task(Quantize, argv ++ ["--statistics", seen])
      assert stderr =~ "there are none of model.layers.0."
      assert {2, _, stderr} = task(Quantize, [@model, "--to", to, "--recipe", "gtpq"])
      assert stderr =~ "did you mean gptq?"
    end

    test "prints the report as JSON, alone on standard output", %{dir: dir} do
      to = Path.join(dir, "out")

      argv =
        [@model, "--to", to, "--format", "int8", "--json"] ++
          ["--exclude", "layers\\.0\\.", "--exclude", "q_proj", "--include", "embed_tokens"]

      assert {0, stdout, _} = task(Quantize, argv)
      report = decode!(stdout)
      assert report == to |> Path.join("report.json") |> File.read!() |> decode!()
      assert report["recipe"]["exclude"] == ["layers\\.0\\.", "q_proj"]

      actions = Map.new(report["tensors"], &{&1["name"], &1["action"]})
      assert actions["model.embed_tokens.weight"] == "quantize"
      assert actions["model.layers.0.mlp.up_proj.weight"] == "keep"
      assert actions["model.layers.1.self_attn.q_proj.weight"] == "keep"
      assert actions["model.layers.1.self_attn.k_proj.weight"] == "quantize"
    end

    test "goes on with what an earlier run left", %{dir: dir} do
      to = Path.join(dir, "out")
      argv = [@model, "--to", to, "--format", "int4"]
      Test.Jobs.interrupt!([source: @model, to: to, format: :int4], 6)
      assert {4, "", stderr} = task(Quantize, argv)
      assert stderr =~ "--resume" and stderr =~ "--force"
      assert {2, "", stderr} = task(Quantize, argv ++ ["--resume", "--block-size", "64"])
      assert stderr =~ "block_size was 128 and is 64"

      assert {again, {0, stdout, _}} =
               Test.Jobs.units_done(fn -> task(Quantize, argv ++ ["--resume"]) end)

      assert length(again) == 14
      assert stdout =~ "quantized  14 tensors"
      assert File.ls!(dir) == ["out"]
    end

    test "explains wrong usage and exits with 2", %{dir: dir} do
      to = Path.join(dir, "out")

      for {argv, message} <- [
            {[], "which SOURCE?"},
            {[@model, "other", "--to", to, "--format", "nf4"], ~s(what is "other"?)},
            {[@model, "--format", "nf4"], "--to DIR is missing"},
            {[@model, "--to", to], "--format is missing"},
            {[@model, "--to", to, "--formt", "nf4"],
             "unknown flag --formt; did you mean --format?"},
            {[@model, "--to", to, "--format", "nf4", "--nodes", "one"], "is no name of a node"},
            {[@model, "--to", to, "--format", "nf4", "--block-size", "big"], ~s(cannot be "big")},
            {[@model, "--to", to, "--format", "nf4", "--threads", "0"], "--threads"},
            {[@model, "--to", to, "--format", "nf5"], "did you mean nf4?"},
            {[@model, "--to", to, "--format", "nf4", "--layout", "awk"], "did you mean awq?"},
            {[@model, "--to", to, "--format", "nf4", "--layout", "awq"], "awq"},
            {[@model, "--to", to, "--format", "nf4", "--method", "best"], "method"},
            {[@model, "--to", to, "--format", "nf4", "--block-size", "63"], "block_size"},
            {[@model, "--to", to, "--format", "nf4", "--memory-limit", "much"], "memory_limit"},
            {[@model, "--to", to, "--format", "nf4", "--non-finite", "drop"],
             "--non-finite is error or keep"},
            {[@model, "--to", to, "--format", "nf4", "--include", "("], "include"}
          ] do
        assert {2, "", stderr} = task(Quantize, argv)
        assert stderr =~ message
      end

      assert File.ls!(dir) == []
    end

    test "exits with 1 for a weight that is not finite, and can keep it", %{dir: dir} do
      bytes = 4096 |> Safetensors.normal(1) |> Safetensors.poison(5, :nan)
      source = Path.join(dir, "in.safetensors")
      Safetensors.write!(source, [{"up.weight", "F32", [64, 64], bytes}])
      argv = [source, "--to", Path.join(dir, "out"), "--format", "nf4"]

      assert {1, stdout, stderr} = task(Quantize, argv)
      assert stdout =~ "PARTIAL    1 tensors"
      assert stderr =~ "up.weight"
      assert stderr =~ "--non-finite keep"

      assert {0, stdout, stderr} = task(Quantize, argv ++ ["--non-finite", "keep"])
      assert stdout =~ "kept: 1 NaN"
      assert stderr =~ "up.weight: kept"
    end

    test "exits with 3 for a source that cannot be read", %{dir: dir} do
      argv = ["--to", Path.join(dir, "out"), "--format", "nf4", "--json"]
      source = Path.join(dir, "nothing")
      assert {3, stdout, stderr} = task(Quantize, [source | argv])
      assert stderr =~ source
      assert %{"error" => %{"kind" => "io", "details" => %{"code" => "enoent"}}} = decode!(stdout)

      File.write!(source, "short")
      assert {3, _, _} = task(Quantize, [source | argv])
    end

    test "exits with 4 for a target that exists, and replaces it with --force", %{dir: dir} do
      argv = [@model, "--to", dir, "--format", "int4"]
      File.write!(Path.join(dir, "precious"), "data")
      assert {4, "", stderr} = task(Quantize, argv)
      assert stderr =~ "--force"
      assert File.ls!(dir) == ["precious"]

      assert {0, _, _} = task(Quantize, argv ++ ["--force"])
      refute File.exists?(Path.join(dir, "precious"))
    end

    test "has help" do
      assert {0, stdout, _} = task(Quantize, ["--help"])
      assert stdout =~ "--memory-limit"
      assert stdout =~ "Exit codes"
    end
  end

  describe "mix viva.inspect" do
    test "lists tensors and totals" do
      assert {0, stdout, ""} = task(Inspect, [@model])
      assert stdout =~ ~r/model\.embed_tokens\.weight\s+bf16\s+1024x256\s+524\.3 kB\s+16\.000/
      assert stdout =~ "20 tensors, 2.89 MB in 1 file"
      assert stdout =~ "tokenizer.json"
    end

    test "shows quantized weights as the tensors that they stand for", %{dir: dir} do
      to = Path.join(dir, "out")
      {0, _, _} = task(Quantize, [@model, "--to", to, "--format", "nf4", "--double-quant"])
      assert {0, stdout, ""} = task(Inspect, [to, "--json"])
      contents = decode!(stdout)
      assert length(contents["tensors"]) == 20

      assert %{"format" => "nf4", "layout" => "bitsandbytes", "shape" => [512, 256]} =
               row =
               Enum.find(
                 contents["tensors"],
                 &(&1["name"] == "model.layers.0.mlp.up_proj.weight")
               )

      assert row["bits_per_weight"] > 4
      assert row["bits_per_weight"] < 4.3
      assert %{"tensors" => 14} = Enum.find(contents["totals"], &(&1["format"] == "nf4"))
      assert contents["files"] == ["model.safetensors"]
    end

    test "exits with 2 and 3", %{dir: dir} do
      assert {2, "", stderr} = task(Inspect, [])
      assert stderr =~ "which PATH?"
      assert {2, "", _} = task(Inspect, [@model, "--jsno"])
      assert {3, "", stderr} = task(Inspect, [Path.join(dir, "nothing")])
      assert stderr =~ "nothing"
      assert {0, stdout, _} = task(Inspect, ["--help"])
      assert stdout =~ "mix viva.inspect PATH"
    end
  end

  # A real node for each, as a shell would start it: exit codes, signals and a
  # full disk are between it and the operating system.
  describe "as an operating system process, mix viva.quantize" do
    defp command(argv, before \\ "") do
      ebin = :viva_tensor |> :code.lib_dir() |> Path.join("ebin")

      code =
        before <>
          "Mix.start(); {:ok, _} = Application.ensure_all_started(:viva_tensor); " <>
          "case VivaTensor.CLI.Quantize.parse(System.argv()) do " <>
          "{:ok, flags} -> System.halt(VivaTensor.CLI.Quantize.run(flags)) end"

      [System.find_executable("elixir"), "-pa", ebin, "-e", code, "--" | argv]
    end

    defp shell(script, arguments) do
      System.cmd("sh", ["-c", script, "sh" | arguments], stderr_to_stdout: true)
    end

    test "exits with 0", %{dir: dir} do
      argv = [@model, "--to", Path.join(dir, "out"), "--format", "int4"]
      assert {output, 0} = shell(~s("$@"), command(argv))
      # Plain lines, since this is no terminal.
      refute output =~ "\r"
      assert output =~ "quantized  14 tensors"
    end

    test "exits with 130 on SIGTERM and leaves nothing", %{dir: dir} do
      # Its workers sleep, so that the signal comes in the middle of a unit.
      slow =
        "Application.ensure_all_started(:viva_tensor); " <>
          "VivaTensor.Telemetry.attach(:slow, [[:viva_tensor, :unit, :start]], " <>
          "fn _, _, _, _ -> IO.puts(:stderr, \"unit\"); Process.sleep(300) end); "

      argv = [@model, "--to", Path.join(dir, "out"), "--format", "nf4"]
      log = Path.join(dir, "log")

      script = ~S"""
      log=$1; shift
      "$@" >"$log" 2>&1 &
      pid=$!
      until grep -q unit "$log"; do kill -0 $pid || exit 99; sleep 0.05; done
      kill -TERM $pid
      wait $pid
      """

      assert {_, 130} = shell(script, [log | command(argv, slow)])
      assert File.read!(log) =~ "cancelled"
      assert File.ls!(dir) == ["log"]
    end

    test "exits with 4 on a full disk and on a read-only one, and leaves nothing", %{dir: dir} do
      argv = [@model, "--to", Path.join(dir, "disk/out"), "--format", "int8"]
      disk = Path.join(dir, "disk")
      File.mkdir!(disk)

      # A file system of its own, in a mount namespace that goes with the process.
      script = ~S"""
      disk=$1 options=$2; shift 2
      mount -t tmpfs -o "$options" tmpfs "$disk" || exit 98
      "$@"; code=$?
      ls -A "$disk" | sed 's/^/left: /'
      exit $code
      """

      run = fn options ->
        namespace = if root?(), do: ["-m"], else: ["-rm"]
        arguments = ["sh", "-c", script, "sh", disk, options | command(argv)]
        System.cmd("unshare", namespace ++ arguments, stderr_to_stdout: true)
      end

      if mounts?(disk) do
        for {options, message} <- [{"size=1m", "No space left"}, {"ro", "Read-only"}] do
          assert {output, 4} = run.(options)
          assert output =~ message
          refute output =~ "left:"
        end

        # The same file system with enough room.
        assert {output, 0} = run.("size=8m")
        assert output =~ "left: out"
      else
        IO.puts(:stderr, """

        SKIPPED: a full disk and a read-only one. The tests may not mount a file system
        here (tried unshare -m as root, unshare -rm otherwise, outside of a chroot).
        """)
      end
    end

    defp root?, do: match?({"0\n", 0}, System.cmd("id", ["-u"]))

    defp mounts?(disk) do
      namespace = if root?(), do: "-m", else: "-rm"

      System.find_executable("unshare") != nil and
        match?(
          {_, 0},
          System.cmd("unshare", [namespace, "mount", "-t", "tmpfs", "tmpfs", disk],
            stderr_to_stdout: true
          )
        )
    end
  end
end
