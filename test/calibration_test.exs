defmodule CalibrationTest do
  use ExUnit.Case, async: true

  alias VivaTensor.{Calibration, Error, Tensor}

  # Neighbouring columns are correlated, as those of a model are.
  defp random([rows, columns] = shape, seed) do
    :rand.seed(:exsss, seed)

    values =
      for _ <- 1..rows do
        noise = Enum.scan(for(_ <- 1..columns, do: :rand.normal()), &(&1 + 0.8 * &2))
        for {v, c} <- Enum.with_index(noise, 1), do: v * (0.1 + 5 / c)
      end

    Tensor.from_list!(List.flatten(values), :f32, shape)
  end

  defp output_error(w, q, x) do
    exact = VivaTensor.matmul!(x, VivaTensor.quantize!(w, :int8, scale_dtype: :f32))
    VivaTensor.metrics!(exact, VivaTensor.matmul!(x, q)).sqnr_db
  end

  setup do
    w = Tensor.from_list!(for(i <- 1..8192, do: :math.sin(i * i)), :f32, [64, 128])
    %{w: w, seen: random([256, 128], 1), unseen: random([128, 128], 2)}
  end

  test "every method that sees activations beats rounding to nearest", c do
    plain = output_error(c.w, VivaTensor.quantize!(c.w, :int4), c.unseen)

    for method <- [:gptq, :awq, :awq_gptq] do
      q = VivaTensor.quantize!(c.w, :int4, method: method, activations: c.seen)
      assert output_error(c.w, q, c.unseen) > plain + 0.5, inspect(method)
    end
  end

  test "a calibration that was filled in batches, saved and loaded does the same", c do
    calibration = Calibration.new(samples: 64)
    binary = Tensor.to_binary!(c.seen)
    half = div(byte_size(binary), 2)

    for part <- [binary_part(binary, 0, half), binary_part(binary, half, half)] do
      x = Tensor.from_binary!(part, :f32, [128, 128])
      assert :ok = Calibration.add(calibration, "a.q_proj", x)
    end

    path = Path.join(VivaTensor.Test.Directory.create!(), "statistics.safetensors")
    assert :ok = Calibration.save(calibration, path)
    loaded = Calibration.load!(path)
    assert Calibration.layers(loaded) == [%{name: "a.q_proj", columns: 128, tokens: 256}]

    [a, b] =
      for seen <- [calibration, loaded] do
        options = [method: :awq_gptq, activations: seen, layer: "a.q_proj"]
        c.w |> VivaTensor.quantize!(:nf4, options) |> VivaTensor.Quantized.dump!()
      end

    assert a == b

    merged = Calibration.new(samples: 64)
    :ok = Calibration.merge(merged, loaded)
    :ok = Calibration.merge(merged, loaded)
    assert [%{tokens: 512}] = Calibration.layers(merged)
  end

  test "what is missing or wrong is said", c do
    reason = fn result -> elem(elem(result, 1).reason, 0) end
    gptq = &VivaTensor.quantize(c.w, &1, [{:method, :gptq} | &2])
    assert {:error, %Error{message: message}} = gptq.(:int4, [])
    assert message =~ "activations"
    assert :invalid_option == reason.(gptq.(:q4_0, activations: c.seen))
    assert :invalid_option == reason.(gptq.(:int4, activations: c.seen, damping: 2.0))
    assert :invalid_option == reason.(gptq.(:int4, activations: c.seen, dampling: 0.1))
    assert :shape_mismatch == reason.(gptq.(:int4, activations: random([4, 96], 3)))
    seen = Calibration.new()
    assert :unknown_tensor == reason.(gptq.(:int4, activations: seen, layer: "a"))
    nan = Tensor.from_list!([:nan, 1.0], :f32, [1, 2])
    assert :non_finite == reason.(Calibration.add(seen, "a", nan))
    assert [] == Calibration.layers(seen)
  end
end
