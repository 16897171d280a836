defmodule VivaTensor.SizeOnDiskTest do
  # Bits per weight as a user counts them: the bytes of the written file, all
  # scales, zero points and tables included, over the elements of a 4096 × 4096
  # weight: 4.0×, 7.7× and 7.7× smaller than f32.
  use ExUnit.Case, async: true

  alias VivaTensor.Job
  alias VivaTensor.Test.{Directory, Safetensors}

  @elements 4096 * 4096

  setup_all do
    source = Path.join(Directory.create!(), "model.safetensors")
    # One row of normal draws, repeated: bytes do not depend on the values.
    row = Safetensors.normal(4096, 1)
    bytes = String.duplicate(row, 4096)
    Safetensors.write!(source, [{"layer.weight", "F32", [4096, 4096], bytes}])
    %{source: source}
  end

  for {format, options, most} <- [
        {:int8, [], 8.02},
        {:nf4, [double_quant: true], 4.14},
        {:int4, [], 4.17}
      ] do
    test "#{format} #{inspect(options)} takes at most #{most} bits", %{source: source} do
      to = Path.join(Directory.create!(), "out")
      recipe = [format: unquote(format)] ++ unquote(options)
      {:ok, job} = Job.start([source: source, to: to] ++ recipe)
      {:ok, report} = Job.await(job)

      %{size: bytes} = File.stat!(Path.join(to, "model.safetensors"))
      bits = bytes * 8 / @elements
      assert bits <= unquote(most)
      # The report counts the same, but for the file's own header.
      assert_in_delta report.bits_per_weight, bits, 0.001
      IO.puts("#{unquote(format)}: #{Float.round(bits, 4)} bits per weight on disk")
    end
  end
end
