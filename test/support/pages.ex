defmodule VivaTensor.Test.Pages do
  @moduledoc """
  Reports of jobs that nobody ran.
  """

  @kinds ~w(self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj) ++
           ~w(mlp.gate_proj mlp.up_proj mlp.down_proj)

  @doc "The report of a job of so many tensors, as `report.json` has it, on eight workers."
  def job(count) do
    tensors = for index <- 0..(count - 1)//1, do: row(index)

    %{
      "source" => "/models/large",
      "target" => "/models/large-nf4",
      "recipe" => %{"format" => "nf4", "layout" => "bitsandbytes", "settings" => %{}},
      "files" => [],
      "quarantined" => [],
      "tensors" => tensors,
      "quantized" => count,
      "kept" => 0,
      "input_bytes" => count * 2_000_000,
      "output_bytes" => count * 500_000,
      "bytes_per_second" => 1.0e9,
      "bits_per_weight" => 4.5,
      "sqnr_db" => 20.5,
      "seconds" => count * 0.125 + 1
    }
  end

  defp row(index) do
    kind = Enum.at(@kinds, rem(index, 7))
    layer = div(index, 7)
    began = div(index, 8) * 1.0 + 0.02 * rem(index, 8)
    keep? = rem(index, 9) == 8

    %{
      "name" => "model.layers.#{layer}.#{kind}.weight",
      "dtype" => "bf16",
      "shape" => [1000, 1000],
      "action" => if(keep?, do: "keep", else: "quantize"),
      "format" => if(keep?, do: nil, else: "nf4"),
      "reason" => if(keep?, do: "--exclude", else: nil),
      "input_bytes" => 2_000_000,
      "output_bytes" => if(keep?, do: 2_000_000, else: 530_000 + 10_000 * rem(index, 7)),
      "bits_per_weight" => 4.5,
      "sqnr_db" => if(keep?, do: nil, else: 20 + :math.sin(index) + 0.3 * rem(index, 7)),
      "worker" => rem(index, 8),
      "began" => began,
      "ended" => began + 0.6 + 0.3 * abs(:math.cos(index)),
      "attempt" => 1,
      "verified" => false
    }
  end
end
