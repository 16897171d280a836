defmodule VivaTensor.LayoutsTest do
  use ExUnit.Case, async: true

  alias VivaTensor.{Checkpoint, Job, Tensor}
  alias VivaTensor.Test.Directory

  @model "examples/models/viva-tiny"
  @weight "model.layers.0.mlp.up_proj.weight"

  # layout, format, the job's options, and those that give the same tensor alone
  @cases [
    {:gptq, :int4, [], []},
    {:gptq, :int3, [block_size: 64], [block_size: 64]},
    {:gptq_v2, :int2, [symmetric: true], [symmetric: true]},
    {:gptq, :int8, [], [block_size: 128, scale_dtype: :f16]},
    {:mlx, :int4, [method: :hqq], [method: :hqq, block_size: 64]},
    {:mlx, :int6, [scale_dtype: :bf16], [zero_point: :float, block_size: 64, scale_dtype: :bf16]}
  ]

  for {layout, format, options, alone} <- @cases do
    test "#{format} #{inspect(options)} in #{layout} comes back" do
      to = Path.join(Directory.create!(), "out")
      given = [source: @model, to: to, format: unquote(format), layout: unquote(layout)]
      {:ok, job} = Job.start(given ++ unquote(options))
      {:ok, _report} = Job.await(job)

      ours = @model |> Checkpoint.open!() |> Checkpoint.get!(@weight)
      expected = VivaTensor.quantize!(ours, unquote(format), unquote(alone))
      written = Checkpoint.open!(to)
      read = Checkpoint.get!(written, @weight)
      assert read.format == unquote(format)
      assert values(read) == values(expected)

      if unquote(layout) == :mlx do
        assert %{"bits" => _, "group_size" => 64} = written.config["quantization"]
      else
        config = File.read!(Path.join(to, "quantize_config.json"))
        {:ok, config} = VivaTensor.Native.json_decode(config)
        assert config == written.config["quantization_config"]
        assert config["checkpoint_format"] == to_string(unquote(layout))
      end
    end
  end

  defp values(q), do: q |> VivaTensor.dequantize!(dtype: :f32) |> Tensor.to_binary!()
end
