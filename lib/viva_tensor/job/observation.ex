defmodule VivaTensor.Job.Observation do
  @moduledoc false
  # What a job knows of the activations of a model: the statistics that its recipe
  # names, checked against the weights that it quantizes, and which of these weights
  # share the scales of their columns.
  #
  # Scales are chosen for a group at once, before any unit runs, because a norm that is
  # divided by them and the weights that are multiplied by them are units of their own.
  # They are recorded with a hash of what they were chosen from, and used again by a job
  # that goes on and by other nodes.

  alias VivaTensor.{Calibration, Error, Native, Recipe}
  alias VivaTensor.Job.Unit

  @typedoc "`{into, into_rows?, readers}`: names of tensors."
  @type group :: {String.t(), boolean, [String.t()]}

  @doc """
  Opens what the recipe looks at: its native form, the fields that a plan has of it,
  and the units with what they lack.
  """
  @spec of(Recipe.t(), reference, map, [Unit.t()]) ::
          {:ok, reference | nil, map, [Unit.t()]} | {:error, Error.t()}
  def of(%Recipe{calibrated: false}, _spec, _checkpoint, units), do: {:ok, nil, %{}, units}

  def of(%Recipe{statistics: statistics}, spec, checkpoint, units) do
    quantized = Enum.filter(units, & &1.quantized)
    names = for unit <- quantized, do: unit.name

    with {:ok, observed} <- open(statistics),
         {:ok, layers} <- observed |> Native.observed_layers() |> Error.wrap(:statistics),
         :ok <- all_there(quantized, layers),
         :ok <- of_that_model(quantized, layers),
         {:ok, {groups, unscaled}} <-
           checkpoint.ref |> Native.fold_groups(spec, names) |> Error.wrap(:statistics) do
      reasons = Map.new(unscaled)
      units = for unit <- units, do: unit |> working() |> without(reasons[unit.name])

      {:ok, observed, %{groups: groups, statistics: describe(statistics, quantized, layers)},
       units}
    end
  end

  @doc "Memory that choosing the scales of a group may take."
  @spec bytes(group, [Unit.t()]) :: non_neg_integer
  def bytes({_into, _rows?, readers}, units) do
    readers = Enum.filter(units, &(&1.name in readers))
    Enum.sum(for unit <- readers, do: unit.input_bytes) + gram_bytes(hd(readers))
  end

  @typedoc "Scales of a group, f32 in little-endian order, if there are any, and a hash of its tensors."
  @type chosen :: %{scales: binary | nil, source_hash: binary}

  @doc """
  Chooses the scales of a group and uses them. Returns them, and what to add to the
  reason of some tensors.
  """
  @spec search(reference, reference, reference, group, reference) ::
          {:ok, {chosen, %{String.t() => String.t()}}} | {:error, Error.t()}
  def search(observed, checkpoint, spec, group, cancel) do
    result = Native.fold_search(observed, checkpoint, spec, group, cancel)

    with {:ok, scales} <- Error.wrap(result, :statistics),
         {:ok, notes} <- use_scales(observed, checkpoint, group, scales),
         {:ok, hash} <- source_hash(checkpoint, group) do
      {:ok, {%{scales: scales, source_hash: hash}, notes}}
    end
  end

  @doc "Uses scales that were chosen before. Returns what to add to the reason of some tensors."
  @spec use_scales(reference, reference, group, binary | nil) ::
          {:ok, %{String.t() => String.t()}} | {:error, Error.t()}
  def use_scales(_observed, _checkpoint, {_, _, readers}, nil) do
    {:ok, Map.new(readers, &{&1, "no scales are better than none"})}
  end

  def use_scales(observed, checkpoint, group, scales) do
    result = Native.fold_use(observed, checkpoint, group, scales)

    with {:ok, changed} <- Error.wrap(result, :statistics),
         do: {:ok, Map.new(changed, &{&1, "divided by scales"})}
  end

  @doc "A hash of the tensors of a group, by which its scales are known again."
  @spec source_hash(reference, group) :: {:ok, binary} | {:error, Error.t()}
  def source_hash(checkpoint, {into, _rows?, readers}) do
    checkpoint |> Native.source_hash([into | readers]) |> Error.wrap(:source)
  end

  @doc "What the report says of a group with weights that are not finite."
  @spec not_finite(group) :: %{String.t() => String.t()}
  def not_finite({_into, _rows?, readers}) do
    Map.new(readers, &{&1, "not scaled: it shares scales with a weight that is not finite"})
  end

  @doc "A unit with more to say in its reason."
  @spec annotate(Unit.t(), %{String.t() => String.t()}) :: Unit.t()
  def annotate(%Unit{} = unit, notes) do
    case Map.fetch(notes, unit.name) do
      {:ok, note} -> %{unit | reason: join(unit.reason, note)}
      :error -> unit
    end
  end

  defp open(%Calibration{ref: ref}), do: {:ok, Native.observed_copy(ref)}
  defp open(path), do: path |> Native.observed_open() |> Error.wrap(:statistics)

  defp all_there(units, layers) do
    case for unit <- units, layer = layer(unit), not is_map_key(layers, layer), do: layer do
      [] ->
        :ok

      missing ->
        {:error,
         Error.new(
           :statistics,
           {:missing_statistics, %{layers: missing}},
           "there are none of #{listed(missing)}; record them, as " <>
             "examples/calibration/record.py does, or exclude those weights"
         )}
    end
  end

  defp listed([first, second, third | [_, _ | _] = more]),
    do: "#{first}, #{second}, #{third} and #{length(more)} other layers"

  defp listed(names), do: Enum.join(names, ", ")

  defp of_that_model(units, layers) do
    Enum.find_value(units, :ok, fn unit ->
      columns = layers[layer(unit)].columns
      [_rows, expected] = unit.shape

      if columns != expected do
        what = "columns that were recorded of #{layer(unit)}"

        {:error,
         Error.new(
           :statistics,
           {:size_mismatch, %{what: what, expected: expected, actual: columns}},
           "#{what}: expected #{expected}, got #{columns}; are they of another model?"
         )}
      end
    end)
  end

  defp layer(unit), do: String.replace_suffix(unit.name, ".weight", "")

  # The weight in f32, twice, and its codes; the Gram matrix as it is read, scaled and
  # factored.
  defp working(%Unit{action: :quantize} = unit) do
    %{unit | working_bytes: 12 * Enum.product(unit.shape) + 2 * gram_bytes(unit)}
  end

  defp working(unit), do: unit

  defp gram_bytes(%Unit{shape: [_rows, columns]}), do: 8 * columns * columns

  defp without(unit, nil), do: unit
  defp without(unit, reason), do: %{unit | reason: join(unit.reason, "not scaled: #{reason}")}

  defp join(nil, note), do: note
  defp join(reason, note), do: "#{reason}; #{note}"

  defp describe(statistics, units, layers) do
    rows = for unit <- units, do: layers[layer(unit)].tokens

    %{
      file: if(is_binary(statistics), do: statistics),
      layers: length(units),
      tokens: Enum.min(rows, fn -> 0 end)
    }
  end
end
