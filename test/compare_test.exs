defmodule CompareTest do
  # The task writes to standard output and standard error.
  use ExUnit.Case, async: false

  alias Mix.Tasks.Viva
  alias VivaTensor.{Compare, Native, Plot, Test}
  alias VivaTensor.Test.{Directory, Safetensors}

  doctest VivaTensor.Compare
  doctest VivaTensor.Compare.Histogram
  doctest VivaTensor.Plot
  doctest VivaTensor.Plot.Axis
  doctest VivaTensor.CLI.Compare

  @model "examples/models/viva-tiny"
  @weight "model.layers.1.mlp.up_proj.weight"
  @seen "examples/calibration/viva-tiny.safetensors"
  @unseen "examples/calibration/viva-tiny-held-out.safetensors"

  defp task(argv), do: Test.Task.run(Viva.Compare, argv)

  defp json!(argv) do
    assert {0, stdout, _} = task(argv ++ ["--json"])
    {:ok, term} = Native.json_decode(stdout)
    term
  end

  # Every tag is closed in its order, every attribute quoted, and nothing else has a
  # character that XML keeps for itself.
  defp well_formed?(xml) do
    tag = ~r{<(/?)([a-z]+)((?: [a-zA-Z0-9-]+="[^"<]*")*)(/?)>}
    refute Regex.replace(tag, xml, "") =~ ~r/[<>]|&(?!amp;|lt;|gt;|quot;)/

    [] ==
      tag
      |> Regex.scan(xml)
      |> Enum.reduce([], fn
        [_, "", name, _, ""], open -> [name | open]
        [_, "", _name, _, "/"], open -> open
        [_, "/", name, "", ""], [name | open] -> open
      end)
  end

  test "every format by rtn and mse, the front marked" do
    assert {0, stdout, stderr} = task([@model, "--tensor", @weight])
    assert stdout =~ "#{@model}: #{@weight}"

    for %{name: format} <- VivaTensor.formats(), method <- ["rtn", "mse"] do
      assert stdout =~ ~r/^#{format} +#{method} /m
    end

    assert stdout =~ ~r/^q8_0 +mse +8\.500 +4\d\.\d\d +\d+\.\d\d  \*$/m
    refute stdout =~ "output error"
    assert stderr =~ "1/1 tensors"
    refute stdout =~ "\e["
    refute stderr =~ "\e["
  end

  test "with activations methods are measured on those that none saw" do
    argv = [@model, "--activations", @seen, "--held-out", @unseen, "--formats", "int4,q4_0"]
    assert {0, stdout, _} = task(argv)
    assert stdout =~ "3 tensors, 262144 weights"
    assert stdout =~ "output error: on activations that no method saw"
    assert stdout =~ "left out, without activations: 11 tensors"
    assert stdout =~ "not measured: q4_0 (awq_gptq, gptq): the format has no such method"

    result = json!(argv)
    assert result["measured_on"] == "held_out"
    assert length(result["left_out"]) == 11
    rows = Map.new(result["rows"], &{{&1["format"], &1["method"]}, &1})
    error = &Map.fetch!(rows, {"int4", &1})["output_error"]
    for method <- ~w(awq gptq awq_gptq), do: assert(error.(method) < error.("rtn"))
    assert rows[{"int4", "gptq"}]["front"]
    refute rows[{"int4", "rtn"}]["front"]

    # What the methods saw flatters them, and the table says so.
    assert {0, stdout, _} = task(Enum.take(argv, 3) ++ ["--formats", "int4"])
    assert stdout =~ "on the calibration's own activations"
  end

  test "no row of the front is beaten, and every other is" do
    {:ok, compared} = Compare.run(@model, tensor: @weight)
    better? = fn a, b -> a.bits_per_weight <= b.bits_per_weight and a.sqnr_db >= b.sqnr_db end

    for row <- compared.rows do
      beaten? = Enum.any?(compared.rows, &(&1 != row and better?.(&1, row)))
      assert row.front != beaten?
    end
  end

  test "figures are those of the library, of several tensors together" do
    {:ok, compared} = Compare.run(@model, formats: [:int8], methods: [:rtn])
    assert [%{tensors: 14, front: true} = row] = compared.rows
    ckpt = VivaTensor.Checkpoint.open!(@model)

    {signal, noise} =
      Enum.reduce(compared.tensors, {0.0, 0.0}, fn name, {signal, noise} ->
        weight = VivaTensor.Checkpoint.get!(ckpt, name)
        metrics = VivaTensor.metrics!(weight, VivaTensor.quantize!(weight, :int8))
        energy = metrics.mse * Enum.product(weight.shape)
        {signal + energy * :math.pow(10, metrics.sqnr_db / 10), noise + energy}
      end)

    assert_in_delta row.sqnr_db, 10 * :math.log10(signal / noise), 1.0e-9
  end

  test "tensors that a format cannot divide are said, and keep it off the front" do
    dir = Directory.create!()
    path = Path.join(dir, "odd.safetensors")

    Safetensors.write!(path, [
      {"a.weight", "F32", [64, 256], Safetensors.normal(64 * 256, 1)},
      {"b.weight", "F32", [64, 72], Safetensors.normal(64 * 72, 2)}
    ])

    assert {0, stdout, _} = task([path, "--formats", "int8,q4_k", "--methods", "rtn"])
    assert stdout =~ ~r/^int8 +rtn +2 .*\*$/m
    assert stdout =~ ~r/^q4_k +rtn +1 .*\d$/m
    assert stdout =~ ~r/not measured for 1 tensor \(b\.weight\): q4_k \(rtn\): .*72/

    argv = [path, "--tensor", "b.weight", "--formats", "q4_k"]
    assert {1, "", stderr} = task(argv)
    assert stderr =~ "72"
  end

  test "the plot is an SVG of every row that needs nothing else" do
    path = Path.join(Directory.create!(), "plot.svg")
    assert {0, _, _} = task([@model, "--tensor", @weight, "--svg", path])
    svg = File.read!(path)
    assert well_formed?(svg)
    assert svg =~ "prefers-color-scheme: dark"
    refute svg =~ ~r/href|url\(|<script/
    formats = length(VivaTensor.formats())
    assert length(Regex.scan(~r/<title>/, svg)) == 2 * formats
    assert svg =~ "bits per weight"
    assert svg =~ "SQNR of the weights, dB"

    assert {4, "", stderr} =
             task([@model, "--tensor", @weight, "--formats", "nf4", "--svg", "/no/such/dir/a.svg"])

    assert stderr =~ "/no/such/dir/a.svg: no such file or directory"
  end

  test "plots of nothing, of one point and of wide ranges are plots" do
    point = &%{x: &1, y: &2, label: "<a & b>", series: "s", front: true}

    for points <- [[], [point.(4.5, 1.0)], [point.(1, 1.0e-9), point.(9, 1.0e9)]],
        log <- [false, true] do
      svg = points |> Plot.scatter(x: "x", y: "y", log: log) |> IO.iodata_to_binary()
      assert well_formed?(svg)
      assert length(Regex.scan(~r/<title>/, svg)) == length(points)
    end

    svg = [point.(1, 0.0), point.(2, :nan)] |> Plot.scatter(log: true) |> IO.iodata_to_binary()
    refute svg =~ "<title>"
  end

  test "wrong usage is explained and exits with 2, a bad file with 3" do
    assert {2, "", stderr} = task([])
    assert stderr =~ "which WEIGHTS?"
    assert {2, "", stderr} = task([@model, "--format", "nf4"])
    assert stderr =~ "did you mean --formats?"
    assert {2, "", stderr} = task([@model, "--formats", "nf5"])
    assert stderr =~ "did you mean nf4?"
    assert {2, "", stderr} = task([@model, "--methods", "gptqq"])
    assert stderr =~ "not gptqq; did you mean gptq?"
    assert {2, "", stderr} = task([@model, "--methods", "gptq", "--formats", "int4"])
    assert stderr =~ "activations"
    assert {2, "", stderr} = task([@model, "--tensor", "model.layers.1.mlp.up_prog.weight"])
    assert stderr =~ "up_proj"
    assert {2, "", stderr} = task([@model, "--scales", "best"])
    assert stderr =~ "rtn or mse"
    assert {3, "", stderr} = task(["no/such/file.safetensors"])
    assert stderr =~ "no/such/file"
    assert {3, "", stderr} = task([@model, "--activations", @model <> "/model.safetensors"])
    assert stderr =~ "holds no statistics"
  end
end
