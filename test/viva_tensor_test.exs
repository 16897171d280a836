defmodule VivaTensorTest do
  use ExUnit.Case, async: true

  import Bitwise

  alias VivaTensor.{Checkpoint, Error, Quantized, Tensor}

  doctest VivaTensor
  doctest VivaTensor.Tensor
  doctest VivaTensor.Quantized
  doctest VivaTensor.Checkpoint
  doctest VivaTensor.Calibration
  doctest VivaTensor.Error

  defp waves(shape) do
    count = Enum.product(shape)
    Tensor.from_list!(for(i <- 1..count, do: :math.sin(i * 0.37) * :math.cos(i)), :f32, shape)
  end

  describe "tensors" do
    test "every dtype goes in and comes out" do
      for dtype <- [:f64, :f32, :f16, :bf16] do
        tensor = Tensor.from_list!([1, -2.5, :infinity, :neg_infinity, :nan], dtype, [5])
        assert Tensor.to_list!(tensor) == [1.0, -2.5, :infinity, :neg_infinity, :nan]
      end

      for {dtype, values} <- [
            i64: [-0x8000000000000000, 0x7FFFFFFFFFFFFFFF],
            i32: [-0x80000000, 0x7FFFFFFF],
            i16: [-0x8000, 0x7FFF],
            i8: [-128, 127],
            u64: [0, 0xFFFFFFFFFFFFFFFF],
            u32: [0, 0xFFFFFFFF],
            u16: [0, 0xFFFF],
            u8: [0, 255],
            bool: [true, false]
          ] do
        tensor = Tensor.from_list!(values, dtype, [2])
        assert Tensor.to_list!(tensor) == values
        again = tensor |> Tensor.to_binary!() |> Tensor.from_binary!(dtype, [2])
        assert Tensor.to_list!(again) == values
      end
    end

    test "binaries of every size and alignment are read in place" do
      for size <- [1, 15, 16, 17, 63, 64, 65, 1000], offset <- 0..3 do
        values = for i <- 1..size, do: i / 4
        bytes = for v <- values, into: <<>>, do: <<v::float-32-little>>
        padded = String.duplicate(<<0>>, offset) <> bytes
        part = binary_part(padded, offset, byte_size(bytes))
        tensor = Tensor.from_binary!(part, :f32, [size])
        assert Tensor.to_list!(tensor) == values
        quantized = VivaTensor.quantize!(tensor, :int8)
        assert VivaTensor.metrics!(tensor, quantized).sqnr_db > 35
      end
    end

    test "what a dtype cannot hold is named" do
      for {list, dtype} <- [
            {[1, 300], :u8},
            {[1, -1], :u8},
            {[1, 0.5], :i32},
            {[1, :big], :f32},
            {[true, 1], :bool},
            {[1, "2"], :f32}
          ] do
        assert {:error, %Error{reason: {:invalid_option, %{option: "element 1"}}}} =
                 Tensor.from_list(list, dtype, [2])
      end
    end

    test "shapes and dtypes are checked" do
      assert {:error, %Error{reason: {:unknown_dtype, _}}} = Tensor.from_binary(<<>>, :f31, [0])
      assert {:error, %Error{reason: {:invalid_option, _}}} = Tensor.from_binary(<<>>, :f32, [-1])
      assert {:error, %Error{reason: {:invalid_option, _}}} = Tensor.from_binary(<<>>, :f32, :x)
      assert {:error, %Error{reason: {:invalid_option, _}}} = Tensor.from_list([1], "f32", [1])

      for shape <- [[1 <<< 62, 4], [1 <<< 70]] do
        assert {:error, %Error{reason: {:shape_overflow, _}}} =
                 Tensor.from_binary(<<>>, :f32, shape)
      end

      assert {:error, %Error{reason: {:size_mismatch, _}}} = Tensor.from_list([1, 2], :f32, [3])
      assert Tensor.from_binary!(<<>>, :f32, [0, 1 <<< 40]).shape == [0, 1 <<< 40]
      assert Tensor.to_list!(Tensor.from_list!([7], :f32, [])) == [7.0]
    end

    test "a bang raises the same error" do
      assert_raise Error, ~r/from_binary: bytes of a f32/, fn ->
        Tensor.from_binary!(<<1>>, :f32, [1])
      end
    end
  end

  describe "quantized tensors" do
    test "go through every format, dump and load" do
      tensor = waves([24, 256])

      for %{name: format} <- VivaTensor.formats(), method <- [:rtn, :mse] do
        quantized = VivaTensor.quantize!(tensor, format, method: method)
        assert quantized.options.method == method
        metrics = VivaTensor.metrics!(tensor, quantized)
        # Dropping half of the weights costs what no bits buy back.
        least = if format == :sparse24, do: 8.5, else: 2.5 * metrics.bits_per_weight
        assert metrics.sqnr_db > least
        assert metrics.bits_per_weight == quantized.bits_per_weight

        assert_in_delta metrics.bound_distance_db,
                        6.0206 * quantized.bits_per_weight - metrics.sqnr_db,
                        0.01

        copy = quantized |> Quantized.dump!() |> Quantized.load!()
        assert copy == %{quantized | ref: copy.ref}

        values = VivaTensor.dequantize!(quantized) |> Tensor.to_binary!()
        assert VivaTensor.dequantize!(copy) |> Tensor.to_binary!() == values

        again = VivaTensor.quantize!(tensor, format, Map.to_list(quantized.options))
        assert Quantized.dump!(again) == Quantized.dump!(quantized)
      end
    end

    test "matmul as LLM.int8() keeps outliers apart" do
      quantized = VivaTensor.quantize!(waves([24, 96]), :int8, scale: :absmax)
      x = Tensor.from_list!([100.0 | List.duplicate(0.01, 95)], :f32, [1, 96])
      [exact | _] = VivaTensor.matmul!(x, quantized) |> Tensor.to_list!()
      [mixed | _] = VivaTensor.matmul!(x, quantized, compute: :llm_int8) |> Tensor.to_list!()
      assert_in_delta mixed, exact, 0.001

      for bad <- [:int9, nil] do
        assert {:error, %Error{reason: {:invalid_option, %{option: "compute"}}}} =
                 VivaTensor.matmul(x, quantized, compute: bad)
      end

      nf4 = VivaTensor.quantize!(waves([24, 96]), :nf4)

      assert {:error, %Error{reason: {:invalid_option, _}}} =
               VivaTensor.matmul(x, nf4, compute: :llm_int8)
    end

    test "matmul in bf16, and in what the machine and the format allow" do
      x = waves([9, 96])

      for format <- [:int8, :fp8_e4m3], compute <- [:bf16, :auto] do
        q = VivaTensor.quantize!(waves([24, 96]), format)
        exact = VivaTensor.matmul!(x, q)
        assert VivaTensor.metrics!(exact, VivaTensor.matmul!(x, q, compute: compute)).sqnr_db > 35
      end

      q = VivaTensor.quantize!(waves([24, 96]), :q8_0)
      auto = VivaTensor.matmul!(x, q, compute: :auto) |> Tensor.to_binary!()
      assert auto == VivaTensor.matmul!(x, q, compute: :int8) |> Tensor.to_binary!()
      assert auto == VivaTensor.matmul!(x, VivaTensor.prepack!(q)) |> Tensor.to_binary!()
    end

    test "matmul adds a bias and a residual" do
      {x, w} = {waves([2, 3, 96]), VivaTensor.quantize!(waves([24, 96]), :int8)}
      bias = Tensor.from_list!(Enum.map(1..24, &(&1 / 8)), :bf16, [24])
      residual = waves([2, 3, 24])

      for weights <- [w, VivaTensor.prepack!(w)] do
        sums = VivaTensor.matmul!(x, weights) |> Tensor.to_list!()
        rows = Enum.zip([sums, Stream.cycle(Tensor.to_list!(bias)), Tensor.to_list!(residual)])
        y = VivaTensor.matmul!(x, weights, bias: bias, residual: residual)
        assert y.shape == [2, 3, 24]

        for {got, {sum, bias, residual}} <- Enum.zip(Tensor.to_list!(y), rows) do
          assert_in_delta got, sum + bias + residual, 1.0e-4
        end

        for {option, bad, kind} <- [
              {:bias, residual, :shape_mismatch},
              {:residual, bias, :shape_mismatch},
              {:bias, Tensor.from_list!(Enum.to_list(1..24), :i32, [24]), :unsupported_dtype},
              {:residual, [1.0], :invalid_option}
            ] do
          assert {:error, %Error{reason: {^kind, _}} = error} =
                   VivaTensor.matmul(x, weights, [{option, bad}])

          assert Exception.message(error) =~ "#{option}"
        end
      end
    end

    test "matmul equals the product with the dequantized weights" do
      x = waves([3, 2, 256])
      weights = waves([10, 256])
      xs = x |> Tensor.to_list!() |> Enum.chunk_every(256)

      for %{name: format} <- VivaTensor.formats() do
        quantized = VivaTensor.quantize!(weights, format)
        ws = quantized |> VivaTensor.dequantize!() |> Tensor.to_list!() |> Enum.chunk_every(256)
        product = VivaTensor.matmul!(x, quantized)
        assert product.shape == [3, 2, 10]

        expected = for x <- xs, w <- ws, do: Enum.zip_with(x, w, &(&1 * &2)) |> Enum.sum()

        for {a, b} <- Enum.zip(Tensor.to_list!(product), expected) do
          assert_in_delta a, b, 1.0e-4
        end

        assert VivaTensor.matmul!(x, quantized, dtype: :bf16).dtype == :bf16
      end
    end

    test "bad requests name what is wrong" do
      tensor = waves([3, 100])

      assert {:error, %Error{reason: {:unknown_format, %{name: "nf5"}}}} =
               VivaTensor.quantize(tensor, :nf5)

      assert {:error, %Error{reason: {:invalid_option, %{option: "blocksize"}}}} =
               VivaTensor.quantize(tensor, :nf4, blocksize: 64)

      assert {:error, %Error{reason: {:invalid_option, %{option: "block_size"}}}} =
               VivaTensor.quantize(tensor, :nf4, block_size: 48)

      assert {:error, %Error{reason: {:invalid_option, %{option: "method"}}}} =
               VivaTensor.quantize(tensor, :int8, method: :best)

      assert {:error, %Error{reason: {:invalid_option, _}}} =
               VivaTensor.quantize(tensor, :int8, [:mse])

      assert {:error, %Error{reason: {:indivisible, %{row: 100, block: 128}}}} =
               VivaTensor.quantize(tensor, :int4)

      integers = Tensor.from_list!([1, 2], :i32, [2])

      assert {:error, %Error{reason: {:unsupported_dtype, _}}} =
               VivaTensor.quantize(integers, :int8)

      quantized = VivaTensor.quantize!(tensor, :int8)

      assert {:error, %Error{reason: {:unsupported_dtype, _}}} =
               VivaTensor.dequantize(quantized, dtype: :i8)

      assert {:error, %Error{reason: {:unknown_dtype, _}}} =
               VivaTensor.dequantize(quantized, dtype: 32)

      assert {:error, %Error{reason: {:invalid_option, %{option: "type"}}}} =
               VivaTensor.dequantize(quantized, type: :f32)

      assert {:error, %Error{reason: {:shape_mismatch, _}}} =
               VivaTensor.matmul(waves([2, 99]), quantized)

      assert {:error, %Error{reason: {:shape_mismatch, _}}} =
               VivaTensor.metrics(waves([100, 3]), quantized)
    end

    test "results that nobody keeps are collected in time" do
      quantized = VivaTensor.quantize!(waves([1024, 1024]), :int8)

      # A process of its own, so that only its own garbage can trigger it.
      peak =
        Task.async(fn ->
          for _ <- 1..200 do
            VivaTensor.dequantize!(quantized)
            :erlang.memory(:binary)
          end
          |> Enum.max()
        end)
        |> Task.await(:infinity)

      # 200 results of 4 MB: all of them would be 800 MB.
      assert peak < 300_000_000
    end
  end

  describe "the machine" do
    test "is described" do
      cpu = VivaTensor.cpu()
      assert cpu.isa in cpu.available
      assert cpu.threads >= 1
    end
  end

  test "a checkpoint holds its tensors as they are" do
    checkpoint = Checkpoint.open!("examples/models/viva-tiny")
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.total_bytes == Enum.sum(Enum.map(checkpoint.entries, & &1.nbytes))
    weight = Checkpoint.get!(checkpoint, "model.layers.0.mlp.up_proj.weight")
    assert weight.shape == [512, 256]
    assert byte_size(Tensor.to_binary!(weight)) == 512 * 256 * 2
    Checkpoint.release(checkpoint)

    assert {:error, %Error{reason: {:released, _}}} =
             Checkpoint.get(checkpoint, "model.norm.weight")
  end
end
