defmodule VivaTensor.Job.Unit do
  @moduledoc """
  The piece of work that a worker does at once: one tensor, read from the source
  and written, quantized or as it is, to its place in a shard of the output.

  Where it goes is reserved when its shard is created, so units may finish in
  any order, and doing one twice writes the same bytes to the same place.
  """

  alias VivaTensor.{Error, Native, Telemetry}

  @enforce_keys [:id, :name, :shape, :dtype, :action, :input_bytes, :output_bytes]
  defstruct [:id, :name, :shape, :dtype, :action, :format, :reason, :input_bytes, :output_bytes]

  @typedoc "`reason` says why a tensor is kept, or has another format than the recipe's."
  @type t :: %__MODULE__{
          id: non_neg_integer,
          name: String.t(),
          shape: [non_neg_integer],
          dtype: String.t(),
          action: :quantize | :keep,
          format: atom,
          reason: String.t() | nil,
          input_bytes: non_neg_integer,
          output_bytes: non_neg_integer
        }

  @doc "Memory that the unit may take while it runs."
  @spec bytes(t) :: non_neg_integer
  def bytes(%__MODULE__{} = unit), do: unit.input_bytes + unit.output_bytes

  @doc "The same tensor, kept unquantized."
  @spec keep(t, String.t()) :: t
  def keep(%__MODULE__{} = unit, reason) do
    %{unit | action: :keep, format: nil, reason: reason, output_bytes: unit.input_bytes}
  end

  @doc "Does the work, in the calling process."
  @spec run(t, map, reference, reference, reference, map) :: {:ok, map} | {:error, Error.t()}
  def run(%__MODULE__{} = unit, checkpoint, spec, shard, cancel, metadata) do
    started = System.monotonic_time()

    Telemetry.execute(
      [:viva_tensor, :unit, :start],
      %{system_time: System.system_time()},
      metadata
    )

    result =
      case unit.action do
        :quantize -> Native.unit_quantize(checkpoint, unit.name, spec, shard, cancel)
        :keep -> Native.unit_keep(checkpoint, unit.name, spec, shard, cancel)
      end
      |> Error.wrap(:unit)

    duration = System.monotonic_time() - started

    case result do
      {:ok, row} ->
        measurements = Map.take(row, [:input_bytes, :output_bytes])
        measurements = Map.put(measurements, :duration, duration)
        Telemetry.execute([:viva_tensor, :unit, :stop], measurements, metadata)

      {:error, error} ->
        metadata = Map.put(metadata, :error, error)
        Telemetry.execute([:viva_tensor, :unit, :exception], %{duration: duration}, metadata)
    end

    result
  end
end
