defmodule VivaTensor.ConvertTaskTest do
  # The tasks write to standard output and standard error.
  use ExUnit.Case, async: false

  alias Mix.Tasks.Viva.Convert
  alias VivaTensor.{Job, Native, Test}
  alias VivaTensor.Test.{Directory, Safetensors}

  @model "examples/models/viva-tiny"

  setup do
    {:ok, dir: Directory.create!()}
  end

  defp task(argv), do: Test.Task.run(Convert, argv)

  describe "mix viva.convert" do
    test "converts and says what it did", %{dir: dir} do
      source = Path.join(dir, "awq")
      some = "layers\\.1|gate_proj|up_proj|o_proj|v_proj"
      {:ok, job} = Job.start(source: @model, to: source, format: :int4, exclude: some)
      {:ok, _} = Job.await(job)
      to = Path.join(dir, "out")
      argv = [source, "--to", to, "--layout", "gptq-v2", "--memory-limit", "64MB"]
      assert {0, stdout, _} = task(argv)
      assert stdout =~ "#{source} -> #{to}: to gptq_v2 layout"
      assert stdout =~ "lossless"
      assert {4, "", stderr} = task(argv)
      assert stderr =~ "exists"
      assert {0, json, _} = task(argv ++ ["--force", "--json"])

      assert {:ok, %{"lossless" => 3, "recipe" => %{"layout" => "gptq_v2"}}} =
               Native.json_decode(json)
    end

    test "refuses what makes no sense", %{dir: dir} do
      to = Path.join(dir, "out")
      assert {2, "", stderr} = task([@model, "--to", to])
      assert stderr =~ "--layout is missing"
      assert {2, "", stderr} = task([@model, "--to", to, "--layout", "plane"])
      assert stderr =~ "did you mean plain?"
      assert {2, "", stderr} = task([@model, "--to", to, "--layout", "plain", "--dtype", "int8"])
      assert stderr =~ "--dtype is f32, f16 or bf16"
      assert {2, "", stderr} = task([@model, "--to", to, "--format", "nf4"])
      assert stderr =~ "unknown flag --format"
      assert {3, "", _} = task(["no/such", "--to", to, "--layout", "plain"])
      # A GGUF file holds the tokenizer too.
      file = Path.join(dir, "bare.safetensors")
      Safetensors.write!(file, [{"a.weight", "F32", [1, 32], Safetensors.normal(32, 1)}])
      assert {3, "", stderr} = task([file, "--to", to, "--layout", "gguf"])
      assert stderr =~ "config.json"
      refute File.exists?(to)
    end

    test "has a page of help" do
      assert {0, stdout, _} = task(["--help"])
      assert stdout =~ "mix viva.convert SOURCE --to DIR --layout gguf"
    end
  end
end
