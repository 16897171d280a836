defmodule CalibratedLayersTest do
  # Layers of a model that was trained, with what they meet in real text: what is
  # claimed of methods on them, measured on text that no method has seen.
  use ExUnit.Case, async: true

  alias VivaTensor.{Calibration, Checkpoint}

  @directory "examples/calibration"

  setup_all do
    %{
      model: Checkpoint.open!("examples/models/viva-tiny"),
      seen: Calibration.load!(Path.join(@directory, "viva-tiny.safetensors")),
      unseen: Calibration.load!(Path.join(@directory, "viva-tiny-held-out.safetensors"))
    }
  end

  defp errors(c, format, methods, options) do
    for %{name: layer} <- Calibration.layers(c.seen) do
      weight = Checkpoint.get!(c.model, layer <> ".weight")
      {:ok, unseen} = Calibration.samples(c.unseen, layer)

      error = fn options ->
        q = VivaTensor.quantize!(weight, format, options)
        VivaTensor.metrics!(weight, q, activations: unseen).output_error
      end

      seen = [activations: c.seen, layer: layer] ++ options
      plain = error.(method: Keyword.get(options, :scales, :rtn))
      Map.new(methods, &{&1, error.([method: &1] ++ seen)}) |> Map.put(:rtn, plain)
    end
  end

  for format <- [:int4, :int3], scales <- [:rtn, :mse] do
    test "awq and gptq beat rounding on layers of a model: #{format}, #{scales} scales", c do
      all = errors(c, unquote(format), [:awq, :gptq, :awq_gptq], scales: unquote(scales))
      assert length(all) == 3

      for layer <- all do
        assert layer.awq < layer.rtn
        assert layer.gptq < layer.rtn
        # Both together: within noise of the better one, or ahead.
        assert layer.awq_gptq < 1.02 * min(layer.awq, layer.gptq)
      end
    end
  end

  test "the rows of a calibration are those of the file", c do
    for %{name: layer, columns: columns, tokens: 128} <- Calibration.layers(c.unseen) do
      assert Calibration.samples!(c.unseen, layer).shape == [128, columns]
      assert Calibration.samples!(c.seen, layer).shape == [64, columns]
    end

    {:error, error} = Calibration.samples(c.seen, "model.layers.1.mlp.up_prog")
    assert {:unknown_tensor, %{hint: hint}} = error.reason
    assert hint =~ "up_proj"
    weight = Checkpoint.get!(c.model, "model.layers.1.mlp.up_proj.weight")
    q = VivaTensor.quantize!(weight, :int4)
    {:error, error} = VivaTensor.metrics(weight, q, activations: c.seen)
    assert {:invalid_option, %{option: "activations"}} = error.reason
    {:error, error} = VivaTensor.metrics(weight, q, activation: c.seen)
    assert {:invalid_option, %{option: "activation"}} = error.reason
  end
end
