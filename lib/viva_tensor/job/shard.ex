defmodule VivaTensor.Job.Shard do
  @moduledoc false
  # One file of the output while it is being written.
  #
  # A shard is opened when its first unit starts and finished when its last one is
  # done. Its id is a list, so that a shard that has to be written again can be
  # replaced by several that sort into its place; its file has a provisional name
  # until the number of shards is certain.
  #
  # ## Weights that are not finite
  #
  # Room in a shard is reserved before its units run, so a weight that turns out to
  # hold NaN or infinities under `non_finite: :keep` does not fit in its place. The
  # unit is only noted, and when all others of its shard are done, that shard alone
  # is written again with those weights kept. The second pass cannot meet others,
  # so no shard is written more than twice, and a checkpoint without such weights,
  # which is nearly every one, pays nothing; a pass that looks for them beforehand
  # would read everything twice for all. The larger shard is cut in several if it
  # would pass `max_shard_size`.

  alias VivaTensor.{Error, Native}
  alias VivaTensor.Job.{FileError, Plan, Unit}

  @enforce_keys [:id, :units, :remaining]
  defstruct [:id, :units, :remaining, :ref, :mark, :written] ++
              [done: {0, 0, 0}, aside: 0, non_finite: %{}]

  @typedoc "A finished file: its name, its bytes, its tensors and theirs."
  @type written :: {String.t(), non_neg_integer, [{String.t(), non_neg_integer}]}

  @typedoc """
  `mark` tells its file from any other to other nodes; of the units that are `done`, their
  number and the bytes that they read and wrote; `non_finite` says of units, by name, what
  they met; `aside` counts those that are put aside.
  """
  @type t :: %__MODULE__{
          id: [non_neg_integer],
          units: [Unit.t()],
          remaining: non_neg_integer,
          ref: reference | nil,
          mark: String.t() | nil,
          done: {non_neg_integer, non_neg_integer, non_neg_integer},
          aside: non_neg_integer,
          non_finite: %{String.t() => String.t()},
          written: written | nil
        }

  @doc "A shard that holds `units`."
  @spec new([non_neg_integer], [Unit.t()]) :: t
  def new(id, units), do: %__MODULE__{id: id, units: units, remaining: length(units)}

  @doc "One tensor less to wait for."
  @spec one_less(t) :: t
  def one_less(%__MODULE__{} = shard), do: %{shard | remaining: shard.remaining - 1}

  @doc "One unit less to wait for, though its weight has to be kept after all."
  @spec keep_later(t, Unit.t(), String.t()) :: t
  def keep_later(%__MODULE__{} = shard, unit, reason) do
    one_less(%{shard | non_finite: Map.put(shard.non_finite, unit.name, reason)})
  end

  @doc "One unit less to wait for, since it is put aside: the shard stays unfinished."
  @spec put_aside(t) :: t
  def put_aside(%__MODULE__{} = shard), do: one_less(%{shard | aside: shard.aside + 1})

  @doc "Whether nothing more is done for it."
  @spec settled?(t) :: boolean
  def settled?(%__MODULE__{} = shard) do
    shard.remaining == 0 and (shard.aside > 0 or shard.written != nil)
  end

  @doc "What is to be done once no unit is waited for."
  @spec next(t) :: :wait | :finish | :rewrite | :leave
  def next(%__MODULE__{remaining: remaining}) when remaining > 0, do: :wait
  def next(%__MODULE__{aside: aside}) when aside > 0, do: :leave
  def next(%__MODULE__{non_finite: none}) when none == %{}, do: :finish
  def next(%__MODULE__{}), do: :rewrite

  @doc "The units of a shard that has to be written again."
  @spec decided_again(t) :: [Unit.t()]
  def decided_again(%__MODULE__{} = shard) do
    for unit <- shard.units do
      case Map.fetch(shard.non_finite, unit.name) do
        {:ok, reason} -> Unit.keep(unit, reason)
        :error -> unit
      end
    end
  end

  @doc """
  Opens the file with room for every unit of the plan's source, unless that was done.
  What an earlier job left in it stays.

  On another node than the job's, where the output is known by its directory, it is the
  file that the job opened, by its mark, and keeps its length: units that come too late,
  from a node that was cut off, must not touch what took its place.
  """
  @spec open(t, reference | Path.t(), Plan.t()) :: {:ok, t} | {:error, Error.t()}
  def open(%__MODULE__{ref: nil} = shard, output, plan) when is_reference(output) do
    with {:ok, directory} <- output |> Native.output_path() |> Error.wrap(:output),
         {:ok, ref} <- create(shard, directory, nil, plan),
         {:ok, mark} <- ref |> Native.shard_mark() |> Error.wrap(:output) do
      {:ok, %{shard | ref: ref, mark: mark}}
    end
  end

  def open(%__MODULE__{ref: nil} = shard, directory, plan) do
    with {:ok, ref} <- create(shard, directory, shard.mark, plan),
         do: {:ok, %{shard | ref: ref}}
  end

  def open(%__MODULE__{} = shard, _output, _plan), do: {:ok, shard}

  defp create(shard, directory, mark, %{work: work, checkpoint: %{ref: source}}) do
    metadata = %{"format" => "pt"}
    path = Path.join(directory, file(shard))

    case work do
      {:quantize, spec, _observed} ->
        tensors = for unit <- shard.units, do: {unit.name, unit.action}
        Native.shard_create(path, mark, spec, tensors, source, metadata)

      {:convert, conversion} ->
        names = for unit <- shard.units, do: unit.name
        Native.conversion_shard(path, mark, conversion, names, source, metadata)
    end
    |> Error.wrap(:output)
  end

  @doc """
  Removes the file of a shard that others replace.

  They have names of their own, so a native call that outlived its killed worker
  can only write to what is unlinked here.
  """
  @spec remove(t, reference) :: :ok | {:error, Error.t()}
  def remove(%__MODULE__{} = shard, output) do
    with {:ok, directory} <- output |> Native.output_path() |> Error.wrap(:output) do
      path = Path.join(directory, file(shard))

      # A job that goes on with another may find it gone.
      case File.rm(path) do
        {:error, :enoent} -> :ok
        result -> FileError.wrap(result, :output, path)
      end
    end
  end

  @doc "Gives the file of a finished shard its final name."
  @spec rename(t, Path.t(), String.t()) :: :ok | {:error, Error.t()}
  def rename(%__MODULE__{} = shard, directory, name) do
    path = Path.join(directory, file(shard))
    path |> File.rename(Path.join(directory, name)) |> FileError.wrap(:output, path)
  end

  @doc "The provisional name of the file."
  @spec file(t) :: String.t()
  def file(%__MODULE__{id: id}), do: "shard-#{Enum.join(id, "-")}"

  @doc "Writes the header and syncs the file."
  @spec finish(reference) :: {:ok, written} | {:error, Error.t()}
  def finish(ref), do: ref |> Native.shard_finish() |> Error.wrap(:output)

  @doc """
  The names that `transformers` looks for, one for each of `count` shards, or the
  name of the one `file` of the layout.

      iex> VivaTensor.Job.Shard.final_names(nil, 1)
      ["model.safetensors"]
      iex> VivaTensor.Job.Shard.final_names(nil, 2)
      ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
      iex> VivaTensor.Job.Shard.final_names("model.gguf", 1)
      ["model.gguf"]
  """
  @spec final_names(String.t() | nil, pos_integer) :: [String.t()]
  def final_names(file, 1) when file != nil, do: [file]

  def final_names(nil, count),
    do: for(index <- 0..(count - 1), do: Native.shard_name(index, count))
end
