defmodule VivaTensor.Job.FilesTest do
  # What jobs read and write. They share one admission.
  use ExUnit.Case, async: false

  import VivaTensor.Test.Jobs

  alias VivaTensor.{Error, Report}
  alias VivaTensor.Test.{Directory, Safetensors}

  @model "examples/models/viva-tiny"

  setup do
    {:ok, dir: Directory.create!()}
  end

  defp weight(path) do
    Safetensors.write!(path, [{"up.weight", "F32", [64, 128], Safetensors.normal(64 * 128, 1)}])
  end

  describe "sources" do
    test "that are not there or not what they claim", %{dir: dir} do
      broken = Path.join(dir, "broken.safetensors")
      File.write!(broken, <<200::little-64, "{}">>)

      for {source, kind} <- [{Path.join(dir, "none"), :io}, {broken, :invalid_file}] do
        assert {:error, %Error{op: :source, reason: {^kind, %{path: path}}}} =
                 run(source: source, to: Path.join(dir, "out"), format: :nf4)

        assert path =~ source
      end

      assert_only(dir, ["broken.safetensors"])
    end

    test "that are quantized already", %{dir: dir} do
      first = Path.join(dir, "first")
      {:ok, _} = run(source: @model, to: first, format: :nf4)

      assert {:error, %Error{op: :source, reason: {:already_quantized, _}}} =
               run(source: first, to: Path.join(dir, "second"), format: :nf4)
    end

    test "sharded, into shards", %{dir: dir} do
      whole = Path.join(dir, "whole")
      {:ok, _} = run(source: @model, to: whole, format: :int8)

      # Everything kept: the same model, cut into shards.
      sharded = Path.join(dir, "sharded")
      limit = 600_000

      {:ok, cut} =
        run(source: @model, to: sharded, format: :int8, exclude: "", max_shard_size: limit)

      assert length(cut.files) > 3
      assert Safetensors.read!(sharded) == Safetensors.read!(@model)
      assert cut.quantized == 0 and cut.bits_per_weight == nil

      assert File.read!(Path.join(sharded, "config.json")) ==
               File.read!(Path.join(@model, "config.json"))

      out = Path.join(dir, "out")
      {:ok, report} = run(source: sharded, to: out, format: :int8, max_shard_size: limit)

      count = length(report.files)
      assert count > 1

      for %{name: name, bytes: bytes} <- report.files do
        assert name =~ ~r/^model-\d{5}-of-#{String.pad_leading("#{count}", 5, "0")}\.safetensors$/
        # The header comes on top of the tensors.
        assert bytes < limit + 10_000
      end

      assert Safetensors.read!(out) == Safetensors.read!(whole)
      refute File.exists?(Path.join(out, "model.safetensors"))
    end

    test "with tensors that nothing can quantize", %{dir: dir} do
      source =
        Safetensors.write!(Path.join(dir, "in.safetensors"), [
          {"empty.weight", "F32", [0, 64], <<>>},
          {"scalar", "F32", [], <<0.5::little-float-32>>},
          {"steps", "I64", [2], <<1::little-64, 2::little-64>>},
          {"odd.weight", "F32", [64, 100], Safetensors.normal(6400, 1)},
          {"even.weight", "F32", [64, 128], Safetensors.normal(8192, 2)}
        ])

      to = Path.join(dir, "out")
      {:ok, report} = run(source: source, to: to, format: :int4, include: ".")

      assert row(report, "empty.weight").reason == "no elements"
      assert row(report, "scalar").reason == "0 dimensions"
      assert row(report, "steps").reason == "i64 values"
      assert row(report, "odd.weight").reason =~ "100"
      assert row(report, "even.weight").action == :quantize

      written = Safetensors.read!(to)

      for {name, tensor} <- Safetensors.read!(source), name != "even.weight" do
        assert written[name] == tensor
      end
    end

    test "without any tensor", %{dir: dir} do
      source = Safetensors.write!(Path.join(dir, "in.safetensors"), [])
      to = Path.join(dir, "out")
      assert {:ok, %Report{quantized: 0, kept: 0}} = run(source: source, to: to, format: :nf4)
      assert Safetensors.read!(to) == %{}
    end
  end

  describe "targets" do
    test "that exist are replaced only with force", %{dir: dir} do
      to = Path.join(dir, "out")
      File.mkdir_p!(to)
      File.write!(Path.join(to, "precious"), "data")
      opts = [source: @model, to: to, format: :nf4]

      assert {:error, %Error{op: :output, reason: {:io, %{code: "eexist"}}}} = run(opts)
      assert File.read!(Path.join(to, "precious")) == "data"
      assert_only(dir, ["out"])

      assert {:ok, _} = run([force: true] ++ opts)
      refute File.exists?(Path.join(to, "precious"))
      assert_only(dir, ["out"])
    end

    test "are never the source", %{dir: dir} do
      source = weight(Path.join(dir, "in/model.safetensors"))
      before = File.read!(source)

      for to <- [Path.dirname(source), source, dir] do
        assert {:error, %Error{op: :output}} =
                 run(source: source, to: to, format: :nf4, force: true)

        assert File.read!(source) == before
      end
    end

    test "that cannot be written", %{dir: dir} do
      file = Path.join(dir, "file")
      File.write!(file, "")

      assert {:error, %Error{op: :output, reason: {:io, %{path: path}}} = error} =
               run(source: @model, to: Path.join(file, "out"), format: :nf4)

      assert path =~ file
      assert Exception.message(error) =~ file
      assert_only(dir, ["file"])
    end

    test "for which the parent directories are missing", %{dir: dir} do
      to = Path.join(dir, "a/b/out")
      assert {:ok, _} = run(source: @model, to: to, format: :nf4)
      assert File.exists?(Path.join(to, "config.json"))
    end
  end
end
