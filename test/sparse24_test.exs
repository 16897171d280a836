defmodule VivaTensor.Sparse24Test do
  use ExUnit.Case, async: true

  alias VivaTensor.{Checkpoint, Error, Tensor}
  alias VivaTensor.CLI
  alias VivaTensor.Test.{Directory, Safetensors}

  @model "examples/models/viva-tiny"
  @weight "model.layers.0.mlp.up_proj.weight"
  @module "model.layers.0.mlp.up_proj"

  # values, format and bits per weight, and what the config says of them
  @cases [
    {:source, "BF16", 9.0, nil},
    {:int8, "I8", 5.13, "int-quantized"},
    {:fp8_e4m3, "F8_E4M3", 5.13, "float-quantized"}
  ]

  for {values, dtype, bits, quantized} <- @cases do
    test "a checkpoint of #{values} is written in compressed-tensors' own tensors" do
      to = Path.join(Directory.create!(), "out")
      argv = [@model, "--to", to, "--format", "sparse24", "--values", "#{unquote(values)}"]
      {:ok, flags} = CLI.Quantize.parse(argv)
      ExUnit.CaptureIO.capture_io(fn -> assert CLI.Quantize.run(flags) == 0 end)

      ours = @model |> Checkpoint.open!() |> Checkpoint.get!(@weight)
      [rows, columns] = ours.shape
      written = Checkpoint.open!(to)
      read = Checkpoint.get!(written, @weight)
      assert {read.format, read.shape} == {:sparse24, ours.shape}
      expected = VivaTensor.quantize!(ours, :sparse24, values: unquote(values))
      assert values(read) == values(expected)
      assert_in_delta VivaTensor.metrics!(ours, read).bits_per_weight, unquote(bits), 0.01

      tensors = Safetensors.read!(to)
      assert {unquote(dtype), [^rows, half], _} = tensors[@module <> ".compressed"]
      assert half == div(columns, 2)
      assert {"U8", [^rows, _], _} = tensors[@module <> ".bitmask"]

      assert {"I64", [2, 1], <<^rows::little-64, ^columns::little-64>>} =
               tensors[@module <> ".shape"]

      refute tensors[@weight]
      config = written.config["quantization_config"]
      assert config["sparsity_config"]["format"] == "sparse-24-bitmask"
      assert config["sparsity_config"]["ignore"] == ["lm_head"]
      assert config["format"] == unquote(quantized)
    end
  end

  test "a product skips nothing but zeros" do
    w = normal([24, 64], 1)
    x = normal([3, 64], 2)
    sparse = VivaTensor.sparsify!(w)
    q = VivaTensor.quantize!(w, :sparse24)
    dense = VivaTensor.quantize!(sparse, :sparse24)
    assert Tensor.to_list!(VivaTensor.dequantize!(q)) == Tensor.to_list!(sparse)
    assert VivaTensor.Quantized.dump!(q) == VivaTensor.Quantized.dump!(dense)

    rows = fn t -> t |> Tensor.to_list!() |> Enum.chunk_every(64) end
    product = x |> VivaTensor.matmul!(q) |> Tensor.to_list!()
    exact = for a <- rows.(x), b <- rows.(sparse), do: Enum.zip(a, b) |> Enum.map(&mul/1)

    for {y, terms} <- Enum.zip(product, exact) do
      # f32 sums of 64 terms.
      assert_in_delta y, Enum.sum(terms), 1.0e-5 * Enum.sum(Enum.map(terms, &abs/1)) + 1.0e-12
    end

    loaded = q |> VivaTensor.Quantized.dump!() |> VivaTensor.Quantized.load!()
    assert values(loaded) == values(q)
  end

  test "what cannot be sparse says why" do
    t = normal([2, 6], 3)
    indivisible = {:indivisible, %{row: 6, block: 4}}
    assert {:error, %Error{reason: ^indivisible}} = VivaTensor.sparsify(t)
    assert {:error, %Error{reason: ^indivisible}} = VivaTensor.quantize(t, :sparse24)

    for {call, option} <- [
          {&VivaTensor.sparsify(&1, scores: 1), "scores"},
          {&VivaTensor.sparsify(&1, mask: 1), "mask"},
          {&VivaTensor.quantize(&1, :sparse24, values: :int4), "values"},
          {&VivaTensor.quantize(&1, :sparse24, method: :hqq), "method"},
          {&VivaTensor.quantize(&1, :sparse24, block_size: :row), "block_size"},
          {&VivaTensor.quantize(&1, :sparse24, values: :int8, block_size: 2), "block_size"}
        ] do
      assert {:error, %Error{reason: {:invalid_option, %{option: ^option}}}} = call.(t)
    end
  end

  defp mul({a, b}), do: a * b

  defp normal([rows, columns] = shape, seed) do
    Tensor.from_binary!(Safetensors.normal(rows * columns, seed), :f32, shape)
  end

  defp values(q), do: q |> VivaTensor.dequantize!(dtype: :f32) |> Tensor.to_binary!()
end
