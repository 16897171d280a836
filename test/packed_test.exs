defmodule VivaTensor.PackedTest do
  use ExUnit.Case, async: false

  alias VivaTensor.{Error, Packed, Quantized, Tensor}

  defp waves([rows, columns] = shape) do
    values = for i <- 1..(rows * columns), do: :math.sin(i * 0.37) * (1 + rem(i, 7))
    Tensor.from_list!(values, :f32, shape)
  end

  @made_of_integers [
    :int8,
    :int4,
    :int3,
    :nf4,
    :fp4,
    :mxfp4,
    :nvfp4,
    :q8_0,
    :q4_0,
    :q4_k,
    :iq4_xs
  ]

  test "packed weights give what the others give, and outlive them" do
    x = waves([3, 256])

    for format <- @made_of_integers do
      q = VivaTensor.quantize!(waves([64, 256]), format)
      exact = VivaTensor.matmul!(x, q)
      product = x |> VivaTensor.matmul!(q, compute: :int8) |> Tensor.to_binary!()

      packed = VivaTensor.prepack!(q)
      assert %Packed{format: ^format, shape: [64, 256], dtype: :f32} = packed
      assert packed.nbytes <= 1.5 * q.nbytes
      assert inspect(packed) =~ "#{format}[64, 256]"

      Quantized.release(q)
      y = VivaTensor.matmul!(x, packed)
      assert Tensor.to_binary!(y) == product
      assert VivaTensor.metrics!(exact, y).sqnr_db > 30
      assert VivaTensor.matmul!(x, packed, dtype: :bf16, compute: :int8).dtype == :bf16

      Packed.release(packed)
      assert {:error, %Error{reason: {:released, _}}} = VivaTensor.matmul(x, packed)
    end
  end

  test "memory is counted while it lives" do
    q = VivaTensor.quantize!(waves([64, 4096]), :int8)
    before = VivaTensor.memory_info().native_bytes
    packed = VivaTensor.prepack!(q)
    assert VivaTensor.memory_info().native_bytes >= before + packed.nbytes
    Packed.release(packed)
  end

  test "what cannot be packed says what to do" do
    for format <- [:fp8_e4m3, :dynamic8, :sparse24] do
      q = VivaTensor.quantize!(waves([8, 64]), format)

      assert {:error, %Error{reason: {:invalid_option, %{message: message}}}} =
               VivaTensor.prepack(q)

      assert message =~ "compute f32"
      assert_raise Error, fn -> VivaTensor.matmul!(waves([1, 64]), q, compute: :int8) end
    end

    q = VivaTensor.quantize!(waves([8, 64]), :int8)
    assert {:error, %Error{reason: {:invalid_option, _}}} = VivaTensor.prepack(q, compute: :f32)

    assert {:error, %Error{}} =
             VivaTensor.matmul(waves([1, 64]), VivaTensor.prepack!(q), compute: :f32)

    assert {:error, %Error{reason: {:shape_mismatch, _}}} =
             VivaTensor.matmul(waves([1, 32]), VivaTensor.prepack!(q))
  end
end
