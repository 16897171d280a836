# Quantizes the layers that a calibration knows and writes what they dequantize to:
# mix run bench/methods/calibrated.exs MODEL STATISTICS OUT BITS METHOD…
alias VivaTensor.{Calibration, Checkpoint, Tensor}

[model, statistics, out, bits | methods] = System.argv()
checkpoint = Checkpoint.open!(model)
calibration = Calibration.load!(statistics)

for method <- Enum.map(methods, &String.to_atom/1),
    %{name: layer} <- Calibration.layers(calibration) do
  options =
    case method do
      method when method in [:rtn, :mse] -> [method: method]
      method -> [method: method, activations: calibration, layer: layer]
    end

  checkpoint
  |> Checkpoint.get!(layer <> ".weight")
  |> VivaTensor.quantize!(String.to_atom("int" <> bits), options)
  |> VivaTensor.dequantize!(dtype: :f32)
  |> then(&File.write!(Path.join(out, "#{method}.#{layer}.f32"), Tensor.to_binary!(&1)))
end
