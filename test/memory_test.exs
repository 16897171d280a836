defmodule MemoryTest do
  # Native memory is counted over the whole VM: nothing may run beside this.
  use ExUnit.Case, async: false

  alias VivaTensor.{Error, Quantized, Tensor}

  test "release frees native memory at once" do
    binary = :binary.copy(<<1.0::float-32-little>>, 8_000_000)
    tensor = Tensor.from_binary!(binary, :f32, [2000, 4000])
    before = VivaTensor.memory_info().native_bytes
    quantized = VivaTensor.quantize!(tensor, :int8)
    assert VivaTensor.memory_info().native_bytes - before >= 8_000_000
    :ok = Quantized.release(quantized)
    assert VivaTensor.memory_info().native_bytes - before < 1_000_000

    :ok = Tensor.release(tensor)
    assert {:error, %Error{reason: {:released, _}}} = VivaTensor.dequantize(quantized)
    assert {:error, %Error{reason: {:released, _}}} = VivaTensor.quantize(tensor, :int8)
  end

  test "a binary is taken out of a tensor by many at once" do
    binary = :binary.copy(<<0.5::float-32-little>>, 100_000)
    tensor = Tensor.from_binary!(binary, :f32, [100_000])

    1..2_000
    |> Task.async_stream(fn _ -> Tensor.to_binary!(tensor) == binary end, max_concurrency: 16)
    |> Enum.each(&assert &1 == {:ok, true})
  end

  test "a tensor over a binary becomes that binary, and a part of one that part" do
    whole = :binary.copy(<<1.0::float-32-little>>, 16_000_000)
    <<_::binary-size(8), part::binary-size(4_000_000), _::binary>> = whole
    before = :erlang.memory(:binary)

    for binary <- [whole, part] do
      tensor = Tensor.from_binary!(binary, :f32, [div(byte_size(binary), 4)])
      back = Tensor.to_binary!(tensor)
      assert :binary.referenced_byte_size(back) == byte_size(whole)
      :ok = Tensor.release(tensor)
      assert back == binary
    end

    assert :erlang.memory(:binary) - before < byte_size(whole)
  end
end
