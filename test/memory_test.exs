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
end
