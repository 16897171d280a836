defmodule VivaTensor.Job.Unit do
  @moduledoc false
  # The piece of work that a worker does at once: one tensor, or a range of the rows of a
  # huge one, read from the source and written, quantized, converted or as it is, to its
  # place in a shard of the output.
  #
  # Where it goes is reserved when its shard is created, so units may finish in
  # any order, and doing one twice writes the same bytes to the same place.

  alias VivaTensor.{Error, Native, Telemetry}

  # Pages of the source and of the output while a tensor is copied.
  @copied_at_once 128 * 1024 * 1024

  @enforce_keys [:id, :name, :shape, :dtype, :action, :input_bytes, :output_bytes]
  defstruct [
    :id,
    :name,
    :shape,
    :dtype,
    :action,
    :format,
    :reason,
    :input_bytes,
    :output_bytes,
    :memory_bytes,
    :rows_at_once,
    :rows,
    :from,
    working_bytes: 0,
    quantized: false
  ]

  @typedoc """
  The native form of a recipe, with what it looks at if its method looks at
  activations, or of a conversion.
  """
  @type work :: {:quantize, reference, reference | nil} | {:convert, reference}

  @typedoc """
  `reason` says why a tensor is kept, has another format than the recipe's, or goes
  without the scales of its method; what is encoded are vectors; `rows_at_once` are those
  that a unit does of a huge tensor, `rows` the first one that it does and the one after its
  last, and `memory_bytes` what input and output then take; `working_bytes` is what its
  method takes beside input and output; `from` is the layout that a converted one had,
  `quantized` whether the output has it quantized.
  """
  @type t :: %__MODULE__{
          id: non_neg_integer,
          name: String.t(),
          shape: [non_neg_integer],
          dtype: String.t(),
          action: :quantize | :convert | :keep | :encode,
          format: atom,
          reason: String.t() | nil,
          input_bytes: non_neg_integer,
          output_bytes: non_neg_integer,
          memory_bytes: non_neg_integer | nil,
          rows_at_once: pos_integer | nil,
          rows: {non_neg_integer, pos_integer} | nil,
          from: atom,
          working_bytes: non_neg_integer,
          quantized: boolean
        }

  @doc "Memory that the unit may take while it runs."
  @spec bytes(t) :: non_neg_integer
  def bytes(%__MODULE__{action: :convert} = unit) do
    # Where codes are chosen anew, all values of the tensor are there at once.
    unit.input_bytes + unit.output_bytes + 4 * Enum.product(unit.shape)
  end

  def bytes(%__MODULE__{action: :keep} = unit) do
    min(unit.input_bytes + unit.output_bytes, @copied_at_once)
  end

  def bytes(%__MODULE__{} = unit) do
    (unit.memory_bytes || unit.input_bytes + unit.output_bytes) + unit.working_bytes
  end

  @doc "The same tensor, kept unquantized."
  @spec keep(t, String.t()) :: t
  def keep(%__MODULE__{} = unit, reason) do
    %{
      unit
      | action: :keep,
        format: nil,
        quantized: false,
        reason: reason,
        output_bytes: unit.input_bytes,
        memory_bytes: nil,
        rows_at_once: nil,
        rows: nil,
        working_bytes: 0
    }
  end

  @doc """
  The units that do a tensor: one, or one for each range of its rows.

      iex> unit = %VivaTensor.Job.Unit{id: 0, name: "a", shape: [5, 4], dtype: "f32", action: :quantize,
      ...>   input_bytes: 80, output_bytes: 40, rows_at_once: 2}
      iex> for part <- VivaTensor.Job.Unit.ranges(unit), do: {part.rows, part.input_bytes}
      [{{0, 2}, 32}, {{2, 4}, 32}, {{4, 5}, 16}]
      iex> VivaTensor.Job.Unit.ranges(%{unit | rows_at_once: nil}) == [%{unit | rows_at_once: nil}]
      true
  """
  @spec ranges(t) :: [t]
  def ranges(%__MODULE__{rows_at_once: nil} = unit), do: [unit]

  def ranges(%__MODULE__{rows_at_once: at_once, shape: [rows, _]} = unit) do
    for first <- 0..(rows - 1)//at_once do
      last = min(first + at_once, rows)

      [input, output] =
        for b <- [unit.input_bytes, unit.output_bytes], do: share(b, first, last, rows)

      part = %{unit | rows_at_once: nil, rows: {first, last}}
      %{part | input_bytes: input, output_bytes: output}
    end
  end

  defp share(bytes, first, last, rows), do: div(bytes * last, rows) - div(bytes * first, rows)

  @doc "What a unit is called where its rows matter."
  @spec label(t) :: String.t()
  def label(%__MODULE__{rows: nil, name: name}), do: name

  def label(%__MODULE__{rows: {first, last}, name: name}),
    do: "#{name} rows #{first} to #{last - 1}"

  @typedoc "What came of a unit: figures, and what it is known again by."
  @type done :: {stats :: map, source_hash :: binary, parts :: [tuple]}

  @doc "Does the work, in the calling process."
  @spec run(t, reference, work, reference, reference, map) :: {:ok, done} | {:error, Error.t()}
  def run(%__MODULE__{} = unit, checkpoint, work, shard, cancel, metadata) do
    started = System.monotonic_time()
    began(metadata)

    result =
      case {work, unit.action} do
        {{:quantize, spec, observed}, :quantize} ->
          tensor = {unit.name, unit.rows}
          Native.unit_quantize(checkpoint, tensor, spec, observed, shard, cancel)

        {{:quantize, spec, observed}, :keep} ->
          Native.unit_keep(checkpoint, unit.name, spec, observed, shard, cancel)

        {{:convert, conversion}, _} ->
          Native.unit_convert(checkpoint, unit.name, conversion, shard, cancel)
      end
      |> Error.wrap(:unit)

    ended(result, System.monotonic_time() - started, metadata)
  end

  @doc """
  Does units that keep their tensors one after the other, in one native call where there is
  one for that: each with when it was begun and ended, and what came of it.
  """
  @spec run_all([{t, map}], reference, work, reference, reference) ::
          [{t, {integer, integer}, {:ok, done} | {:error, Error.t()}}]
  def run_all(units, checkpoint, {:quantize, spec, observed}, shard, cancel) do
    started = System.monotonic_time()
    for {_unit, metadata} <- units, do: began(metadata)
    names = for {unit, _metadata} <- units, do: unit.name

    results =
      case Native.units_keep(checkpoint, names, spec, observed, shard, cancel) do
        {:ok, results} -> results
        error -> for _ <- names, do: {0, error}
      end

    {results, _ended} =
      units
      |> Enum.zip(results)
      |> Enum.map_reduce(started, fn {{unit, metadata}, {took, result}}, began ->
        duration = System.convert_time_unit(took, :nanosecond, :native)
        result = result |> Error.wrap(:unit) |> ended(duration, metadata)
        {{unit, {began, began + duration}, result}, began + duration}
      end)

    results
  end

  def run_all(units, checkpoint, work, shard, cancel) do
    for {unit, metadata} <- units do
      started = System.monotonic_time()
      result = run(unit, checkpoint, work, shard, cancel, metadata)
      {unit, {started, System.monotonic_time()}, result}
    end
  end

  defp began(metadata) do
    system_time = System.system_time()
    Telemetry.execute([:viva_tensor, :unit, :start], %{system_time: system_time}, metadata)
  end

  defp ended({:ok, {stats, _source_hash, _parts}} = result, duration, metadata) do
    measurements =
      stats |> Map.take([:input_bytes, :output_bytes]) |> Map.put(:duration, duration)

    Telemetry.execute([:viva_tensor, :unit, :stop], measurements, metadata)
    result
  end

  defp ended({:error, error} = result, duration, metadata) do
    metadata = Map.put(metadata, :error, error)
    Telemetry.execute([:viva_tensor, :unit, :exception], %{duration: duration}, metadata)
    result
  end
end
