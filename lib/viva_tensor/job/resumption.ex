defmodule VivaTensor.Job.Resumption do
  @moduledoc false
  # What an earlier job left in an unfinished output, held against what is to be done
  # now.
  #
  # Nothing is taken on trust: what the manifest says is done is read back and hashed
  # before it counts, by the steps of the job that goes on with it.

  alias VivaTensor.{Error, Native}
  alias VivaTensor.Job.{FileError, Identity, Manifest, Observation, Options, Plan}
  alias VivaTensor.Job.{Ranges, Rows}

  defstruct at: 0, head: [], scales: %{}, units: %{}, rewritten: %{}, published: nil

  @typedoc "A finished tensor, finished ranges of its rows, or why a weight has to be kept."
  @type unit :: {:unit, map} | {:rows, %{tuple => Ranges.part()}} | {:kept, String.t()}

  @typedoc """
  `scales` were chosen for groups of weights; `units` are finished ones and weights that have to be kept, by shard and name;
  `rewritten` shards were replaced by others; `published` is the report of a job that
  was interrupted after its output appeared.
  """
  @type t :: %__MODULE__{
          at: non_neg_integer,
          head: [Manifest.entry()],
          scales: %{Observation.group() => Observation.chosen()},
          units: %{{Manifest.shard(), String.t()} => unit},
          rewritten: %{Manifest.shard() => %{String.t() => String.t()}},
          published: map | nil
        }

  @doc "Nothing: a job that begins."
  @spec none(Identity.t(), Plan.t(), Options.t()) :: t
  def none(identity, plan, options) do
    units = Enum.concat(plan.shards)

    what = %{
      identity: identity,
      options: Options.to_keyword(options),
      tensors: length(units),
      bytes: units |> Enum.map(& &1.input_bytes) |> Enum.sum()
    }

    %__MODULE__{head: [{:begin, what}]}
  end

  @doc """
  Reads the manifest of an output that is unfinished or published; refuses one whose
  job was another.
  """
  @spec read({:unfinished | :published, Path.t()}, Identity.t(), Plan.t(), Options.t()) ::
          {:ok, t} | {:error, Error.t()}
  def read({what, path}, identity, plan, options) do
    with {:ok, records, at} <- Manifest.read(path) do
      case records do
        [{:begin, %{identity: was}} | records] ->
          found = Enum.reduce(records, %__MODULE__{at: at}, &add/2)
          was = Enum.reduce(records, was, &latest/2)

          with {:ok, head} <- compare(was, identity, plan, found) do
            placed(what, %{found | head: head}, records, Path.dirname(path), plan)
          end

        [] ->
          {:ok, none(identity, plan, options)}
      end
    end
  end

  defp placed(:published, found, records, _directory, plan) do
    rows = Rows.of(records, Enum.concat(plan.shards))
    {:ok, %{found | published: Map.put(found.published, :tensors, rows)}}
  end

  # What was about to appear did not.
  defp placed(:unfinished, found, records, directory, _plan) do
    with :ok <- provisional_names(records, directory), do: {:ok, %{found | published: nil}}
  end

  defp latest({:resumed, identity}, _was), do: identity
  defp latest(_record, was), do: was

  defp add({:scales, group, chosen}, found) do
    %{found | scales: Map.put(found.scales, group, chosen)}
  end

  defp add({:unit, shard, name, unit}, found), do: put(found, shard, name, {:unit, unit})

  defp add({:rows, shard, name, rows, part}, found) do
    case found.units[{shard, name}] do
      {:rows, parts} -> put(found, shard, name, {:rows, Map.put(parts, rows, part)})
      _ -> put(found, shard, name, {:rows, %{rows => part}})
    end
  end

  defp add({:kept, shard, name, reason}, found), do: put(found, shard, name, {:kept, reason})

  defp add({:rewritten, shard, kept}, found) do
    %{found | rewritten: Map.put(found.rewritten, shard, kept)}
  end

  defp add({:published, report}, found), do: %{found | published: report}
  defp add(_record, found), do: found

  defp put(found, shard, name, what) do
    %{found | units: Map.put(found.units, {shard, name}, what)}
  end

  defp compare(was, now, plan, found) do
    case Identity.compare(was, now) do
      {:same, []} ->
        head = if was == now, do: [], else: [{:resumed, now}]
        {:ok, head}

      {:look, _touched} ->
        with :ok <- same_scales(found.scales, plan),
             :ok <- same_content(found.units, plan),
             do: {:ok, [{:resumed, now}]}

      {:error, error} ->
        {:error, error}
    end
  end

  # Scales that weights share come from all of them, finished or not.
  defp same_scales(scales, plan) do
    Enum.reduce_while(scales, :ok, fn {{into, _, _} = group, %{source_hash: was}}, :ok ->
      case Observation.source_hash(plan.checkpoint.ref, group) do
        {:ok, ^was} -> {:cont, :ok}
        {:ok, _} -> {:halt, {:error, Identity.source_changed([{into, other_values(group)}])}}
        error -> {:halt, error}
      end
    end)
  end

  defp other_values({_into, _rows?, readers}) do
    "or one that shares its scales (#{Enum.join(readers, ", ")}) has other values"
  end

  defp same_content(units, plan) do
    conversion = conversion(plan.work)

    made_from =
      for {{_shard, name}, unit} <- units, {rows, was} <- made_from(unit), do: {name, rows, was}

    Enum.reduce_while(made_from, :ok, fn {name, rows, was}, :ok ->
      case plan.checkpoint.ref
           |> Native.unit_source_hash(name, rows, conversion)
           |> Error.wrap(:source) do
        {:ok, ^was} -> {:cont, :ok}
        {:ok, _} -> {:halt, {:error, Identity.source_changed([{name, "has other values"}])}}
        error -> {:halt, error}
      end
    end)
  end

  defp made_from({:unit, unit}), do: Ranges.source_hashes(unit.source_hash)
  defp made_from({:rows, parts}), do: for({rows, part} <- parts, do: {rows, part.source_hash})
  defp made_from({:kept, _reason}), do: []

  defp conversion({:convert, ref}), do: ref
  defp conversion({:quantize, _spec, _observed}), do: nil

  # A job that is interrupted while it gives shards their final names.
  defp provisional_names(records, directory) do
    names = for {:named, names} <- records, {file, final} <- names, do: {file, final}

    Enum.reduce_while(Enum.uniq(names), :ok, fn {file, final}, :ok ->
      [path, named] = for name <- [file, final], do: Path.join(directory, name)

      if File.exists?(named) and not File.exists?(path) do
        case named |> File.rename(path) |> FileError.wrap(:output, named) do
          :ok -> {:cont, :ok}
          error -> {:halt, error}
        end
      else
        {:cont, :ok}
      end
    end)
  end
end
