defmodule VivaTensor.Job.Plan do
  @moduledoc false
  # What a job is going to do: the opened source, one unit for each tensor in the
  # order of the file, and how the units fall into shards.
  #
  # The order of the file is kept because a shard can then be synced and closed as
  # soon as its last unit is written, so few are open at a time, and because the
  # source is read from front to back. Taking the largest units first would even
  # out the end of a job, but one large unit already uses every native thread.

  alias VivaTensor.{Conversion, Error, Native, Recipe}
  alias VivaTensor.Job.{FileError, Observation, Options, Unit}

  @enforce_keys [:checkpoint, :bytes_on_disk, :work, :file, :shards]
  defstruct [:checkpoint, :bytes_on_disk, :work, :file, :shards, :statistics, groups: []]

  @typedoc """
  `checkpoint` is what the native side tells of the opened source, `bytes_on_disk`
  the size of its weight files, headers included, `work` the native form of the
  recipe or of the conversion, `file` the name of the output's
  one file where the layout is a file format that holds a whole model. Where the
  method looks at activations, `statistics` says what it looks at, and `groups` are
  the weights that share scales, which are chosen before any unit runs.
  """
  @type t :: %__MODULE__{
          checkpoint: map,
          bytes_on_disk: non_neg_integer,
          work: Unit.work(),
          file: String.t() | nil,
          shards: [[Unit.t()]],
          statistics: map | nil,
          groups: [Observation.group()]
        }

  @doc "Opens the source and decides for every tensor in it."
  @spec make(Options.t()) :: {:ok, t} | {:error, Error.t()}
  def make(%Options{} = options) do
    with {:ok, checkpoint} <- options.source |> Native.checkpoint_open() |> Error.wrap(:source),
         {:ok, bytes_on_disk} <- bytes_on_disk(checkpoint.files),
         {:ok, decided, units} <- decide(options.recipe, checkpoint),
         {:ok, shards} <- shards(units, decided.file, options.max_shard_size) do
      always = %{checkpoint: checkpoint, bytes_on_disk: bytes_on_disk, shards: shards}
      {:ok, struct!(__MODULE__, Map.merge(decided, always))}
    end
  end

  @doc """
  Groups units into shards of at most `max_shard_size` bytes; a larger unit gets
  a shard of its own. There is always one shard, and one only where the layout
  names the `file`.
  """
  @spec shards([Unit.t()], String.t() | nil, pos_integer) ::
          {:ok, [[Unit.t()]]} | {:error, Error.t()}
  def shards(units, nil, max_shard_size) do
    sizes = Enum.map(units, & &1.output_bytes)

    with {:ok, groups} <- sizes |> Native.plan_shards(max_shard_size) |> Error.wrap(:plan) do
      units = List.to_tuple(units)
      {:ok, for(group <- groups, do: for(index <- group, do: elem(units, index)))}
    end
  end

  def shards(units, _file, _max_shard_size), do: {:ok, [units]}

  defp decide(%Recipe{} = recipe, checkpoint) do
    with :ok <- not_quantized_already(checkpoint),
         {:ok, spec} <- Recipe.spec(recipe),
         {:ok, file} <- spec |> Native.plan_source(checkpoint.ref) |> Error.wrap(:source),
         units = units(checkpoint, spec, recipe),
         {:ok, observed, more, units} <- Observation.of(recipe, spec, checkpoint, units) do
      {:ok, Map.merge(more, %{work: {:quantize, spec, observed}, file: file}), units}
    end
  end

  defp decide(%Conversion{} = conversion, checkpoint) do
    with {:ok, plan} <- Conversion.plan(conversion, checkpoint) do
      units =
        for {unit, id} <- Enum.with_index(plan.units) do
          reason = if unit.action == :keep, do: "not quantized"
          struct!(Unit, Map.merge(unit, %{id: id, reason: reason}))
        end

      {:ok, %{work: {:convert, plan.ref}, file: plan.file}, units}
    end
  end

  defp bytes_on_disk(files) do
    Enum.reduce_while(files, {:ok, 0}, fn file, {:ok, bytes} ->
      case file |> File.stat() |> FileError.wrap(:source, file) do
        {:ok, stat} -> {:cont, {:ok, bytes + stat.size}}
        error -> {:halt, error}
      end
    end)
  end

  defp units(checkpoint, spec, recipe) do
    for {entry, id} <- Enum.with_index(checkpoint.entries) do
      unit = %Unit{
        id: id,
        name: entry.name,
        shape: entry.shape,
        dtype: entry.dtype,
        action: :quantize,
        quantized: true,
        input_bytes: entry.nbytes,
        output_bytes: entry.nbytes
      }

      with :quantize <- Recipe.decide(recipe, entry, checkpoint.config),
           {:ok, %{bytes: bytes, format: format}} <-
             Native.plan_tensor(spec, entry.name, entry.shape, entry.dtype),
           {:ok, rows} <- Native.plan_rows(spec, checkpoint.ref, entry.name) do
        reason = if format != recipe.format, do: "#{recipe.format} does not divide its rows"
        {at_once, memory} = rows || {nil, nil}
        unit = %{unit | output_bytes: bytes, format: format, reason: reason}
        %{unit | rows_at_once: at_once, memory_bytes: memory}
      else
        {:keep, reason} -> Unit.keep(unit, reason)
        {:error, {_kind, _details, message}} -> Unit.keep(unit, message)
      end
    end
  end

  # The tensors tell, and where they do not, the configuration does.
  defp not_quantized_already(checkpoint) do
    with {:ok, contents} <- checkpoint.ref |> Native.checkpoint_contents() |> Error.wrap(:source) do
      case {Enum.find(contents, & &1.layout), checkpoint.config} do
        {%{layout: layout, format: format}, _} ->
          quantized_already("#{format} in #{layout} layout", layout)

        {nil, %{"quantization_config" => %{} = config}} ->
          method = config["quant_method"] || "an unnamed method"
          quantized_already(method, method)

        _ ->
          :ok
      end
    end
  end

  defp quantized_already(what, method) do
    {:error,
     Error.new(
       :source,
       {:already_quantized, %{quant_method: to_string(method)}},
       "the source is quantized already (#{what}); start from the original checkpoint, " <>
         "or give it another layout with mix viva.convert"
     )}
  end
end
