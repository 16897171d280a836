defmodule VivaTensor.ReportTest do
  use ExUnit.Case, async: true
  doctest VivaTensor.Report
  doctest VivaTensor.Size
  doctest VivaTensor.Table

  alias VivaTensor.{Recipe, Report}

  defp quantized(name, elements, sqnr_db, mse) do
    %{
      name: name,
      shape: [1, elements],
      dtype: "f32",
      action: :quantize,
      format: :nf4,
      reason: nil,
      input_bytes: elements * 4,
      output_bytes: div(elements, 2) + 8,
      elements: elements,
      bits_per_weight: (div(elements, 2) + 8) * 8 / elements,
      mse: mse,
      sqnr_db: sqnr_db,
      mean_error: 0.01,
      max_error: 0.1,
      cosine: 0.99
    }
  end

  defp kept(name) do
    %{
      name: name,
      shape: [64],
      dtype: "f32",
      action: :keep,
      reason: "norm",
      input_bytes: 256,
      output_bytes: 256,
      elements: 64
    }
  end

  defp report(tensors) do
    {:ok, recipe} = Recipe.new(format: :nf4, double_quant: true)

    Report.new(%{
      source: "a",
      target: "b",
      recipe: recipe,
      tensors: tensors,
      files: [%{name: "model.safetensors", bytes: 1_000}],
      input_bytes: 8_000,
      seconds: 2.0
    })
  end

  test "adds up sizes, bits and energies" do
    # Signals of 100 and 1000 per weight, errors of 1 and 1: 20 and 30 dB.
    report =
      report([
        quantized("layers.0.weight", 1000, 20.0, 1.0),
        quantized("layers.1.weight", 1000, 30.0, 1.0),
        kept("norm.weight")
      ])

    assert report.quantized == 2 and report.kept == 1
    assert report.ratio == 8.0
    assert_in_delta report.bits_per_weight, 508 * 8 / 1000, 1.0e-9
    assert_in_delta report.sqnr_db, 10 * :math.log10(1100 / 2), 1.0e-9
    assert report.worst == %{name: "layers.0.weight", sqnr_db: 20.0}
    assert report.bytes_per_second == 8256 / 2

    table = Report.table(report)
    assert table =~ ~r/layers\.\*\.weight +2 +f32 +1x1000 +nf4 +8\.0 kB +1\.0 kB +4\.064 +20\.00/
    assert table =~ ~r/norm\.weight +1 +f32 +64 +kept: norm +256 B +256 B\n/
    assert table =~ "8.0 kB -> 1.0 kB (8.00x smaller)"
    assert Report.table(report, tensors: true) =~ "layers.1.weight"
    # A terminal without UTF-8 can print it.
    assert table == for(<<c <- table>>, c < 128, into: "", do: <<c>>)
  end

  test "has no figures where there is nothing to measure" do
    nothing = report([kept("norm.weight")])
    assert %{bits_per_weight: nil, sqnr_db: nil, worst: nil} = nothing
    assert Report.table(nothing) =~ "quantized  nothing"

    exact = report([quantized("zeros.weight", 100, nil, 0.0)])
    assert %{sqnr_db: nil, worst: nil} = exact
    assert Report.table(exact) =~ "no error"
  end

  test "a row counts bits from the bytes in the file, and has no number for what is none" do
    unit = %{
      name: "a",
      shape: [1, 8],
      dtype: "f32",
      action: :quantize,
      format: :nf4,
      reason: nil,
      id: 1
    }

    stats = %{
      input_bytes: 32,
      output_bytes: 6,
      elements: 8,
      bits_per_weight: 4.5,
      mse: 0.0,
      sqnr_db: :infinity,
      cosine: :nan
    }

    row = Report.row(unit, stats)
    assert %{bits_per_weight: 6.0, sqnr_db: nil, cosine: nil} = row
    assert row.mse == 0
    refute Map.has_key?(row, :id)

    kept = Report.row(%{unit | action: :keep, reason: "norm"}, Map.take(stats, [:elements]))
    refute Map.has_key?(kept, :bits_per_weight)
  end

  test "is plain data in report.json" do
    map = Report.to_map(report([kept("norm.weight")]))
    assert map.recipe.format == :nf4
    assert {:ok, json} = VivaTensor.Native.json_encode(map, true)
    assert {:ok, decoded} = VivaTensor.Native.json_decode(json)
    assert decoded["tensors"] |> hd() |> Map.fetch!("reason") == "norm"
    assert decoded["versions"]["elixir"] == System.version()
  end
end
