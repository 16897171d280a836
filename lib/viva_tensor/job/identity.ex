defmodule VivaTensor.Job.Identity do
  @moduledoc false
  # What has to be the same for an unfinished output to be gone on with: the version of
  # the program, the recipe, and the source.
  #
  # A file of the source is known by its length and by what the file system says of it.
  # Where only the latter differs, as after a copy, the content decides: every finished
  # unit has a hash of what it was made from.

  alias VivaTensor.{Calibration, Conversion, Error, Native, Recipe, Size, Vectors}
  alias VivaTensor.Job.{Options, Plan}
  alias VivaTensor.Job.Vectors.Source

  @typedoc """
  `recipe` is what was asked for, in words; `files` are those of the source, by
  name; `tensors` and `plan` are hashes of what is in them and of what becomes of it.
  """
  @type t :: %{
          version: String.t(),
          recipe: %{String.t() => term},
          hash: binary,
          non_finite: atom,
          files: %{String.t() => {non_neg_integer, String.t()}},
          tensors: binary,
          plan: binary
        }

  @doc "The plan of a job, and what it is known again by."
  @spec plan(Options.t()) :: {:ok, {Plan.t(), t}} | {:error, Error.t()}
  def plan(options) do
    with {:ok, plan} <- Plan.make(options),
         {:ok, identity} <- of(options, plan),
         do: {:ok, {plan, identity}}
  end

  @doc "The identity of what a job is to do."
  @spec of(Options.t(), Plan.t()) :: {:ok, t} | {:error, Error.t()}
  def of(%Options{} = options, %Plan{} = plan) do
    with {:ok, files} <- files(plan.checkpoint.files),
         {:ok, recipe} <- recipe(options.recipe) do
      recipe = Map.put(recipe, "max_shard_size", Size.format(options.max_shard_size))

      {:ok,
       %{
         version: to_string(Application.spec(:viva_tensor, :vsn)),
         recipe: recipe,
         hash: hash(recipe),
         non_finite: Map.get(options.recipe, :non_finite),
         files: files,
         tensors: hash(for e <- plan.checkpoint.entries, do: {e.name, e.dtype, e.shape}),
         plan:
           hash(
             for {units, n} <- Enum.with_index(plan.shards), u <- units do
               {n, u.name, u.action, u.format, u.output_bytes}
             end
           )
       }}
    end
  end

  @doc "The identity of what becomes of vectors; a stream has no files."
  @spec of_vectors(Options.t(), Source.t()) :: {:ok, t} | {:error, Error.t()}
  def of_vectors(%Options{recipe: recipe}, source) do
    with {:ok, files} <- files(source.files) do
      recipe = recipe |> Vectors.Recipe.to_map() |> words()

      {:ok,
       %{
         version: to_string(Application.spec(:viva_tensor, :vsn)),
         recipe: recipe,
         hash: hash(recipe),
         non_finite: nil,
         files: files,
         tensors: hash({source.dtype, source.dimension, source.count}),
         plan: <<>>
       }}
    end
  end

  @doc "A hash of everything that decides what the output is."
  @spec digest(t) :: String.t()
  def digest(identity), do: identity |> hash() |> Base.encode16(case: :lower)

  @doc "Fails if the files of the source are not those that the identity is of."
  @spec same_source(t, Plan.t()) :: :ok | {:error, Error.t()}
  def same_source(identity, plan), do: same_files(identity, plan.checkpoint.files)

  @doc "The same of files."
  @spec same_files(t, [Path.t()]) :: :ok | {:error, Error.t()}
  def same_files(identity, files) do
    with {:ok, files} <- files(files) do
      case for {name, now} <- files, now != identity.files[name], do: name do
        [] ->
          :ok

        [name | _] ->
          {:error, source_changed([{name, "was changed while it was read"}])}
      end
    end
  end

  @doc """
  Fails if another node, whose identity comes second, would not do the same: with another
  program, or from other files under the same path.
  """
  @spec same_work(t, t) :: :ok | {:error, Error.t()}
  def same_work(job, here) do
    files = for {name, file} <- job.files, written(file) != written(here.files[name]), do: name

    cond do
      job.version != here.version ->
        another("it runs viva_tensor #{here.version} where the job runs #{job.version}")

      files != [] ->
        another("it sees another #{Enum.join(files, ", ")}: nodes of a job share their storage")

      {job.hash, job.tensors, job.plan} != {here.hash, here.tensors, here.plan} ->
        another("it plans something else of the same source")

      true ->
        :ok
    end
  end

  # Length and time of the last change: what two machines see of one file.
  defp written(nil), do: nil

  defp written({bytes, identity}) do
    [_inode, modified, _changed] = String.split(identity, " ")
    {bytes, modified}
  end

  defp another(how), do: {:error, Error.new(:job, {:another_node, %{how: how}}, how)}

  @doc "Why one cannot be gone on with as the other, or which files have to be looked into."
  @spec compare(t, t) :: {:same | :look, [String.t()]} | {:error, Error.t()}
  def compare(was, now) do
    case {recipe_changes(was, now), source_changes(was, now)} do
      {[], []} ->
        touched = for {name, file} <- now.files, file != was.files[name], do: name
        {if(touched == [], do: :same, else: :look), touched}

      {[], changes} ->
        {:error, source_changed(changes)}

      {changes, _} ->
        {:error, changed(:recipe, changes, "give the same as before")}
    end
  end

  @doc "The error of a source that is not what it was."
  @spec source_changed([{String.t(), String.t()}]) :: Error.t()
  def source_changed(changes), do: changed(:source, changes, "put the old one back")

  defp changed(op, changes, instead) do
    text = Enum.map_join(changes, ", ", fn {what, how} -> "#{what} #{how}" end)
    changes = for {what, how} <- changes, do: %{what: what, how: how}

    Error.new(
      op,
      {:changed, %{changes: changes}},
      "the unfinished output cannot be gone on with: #{text}; #{instead}, or begin again " <>
        "with --force and without --resume"
    )
  end

  defp recipe_changes(was, now) do
    version = if was.version != now.version, do: [{"viva_tensor", was.version, now.version}]

    # Weights that failed a job may be kept by the one that goes on with it.
    non_finite =
      if was.non_finite != now.non_finite and now.non_finite != :keep,
        do: [{"non_finite", was.non_finite, now.non_finite}]

    recipe =
      for key <- Enum.uniq(Map.keys(was.recipe) ++ Map.keys(now.recipe)),
          {a, b} = {was.recipe[key], now.recipe[key]},
          a != b,
          do: {key, a, b}

    for {what, a, b} <- Enum.concat([version || [], Enum.sort(recipe), non_finite || []]) do
      {what, "was #{show(a)} and is #{show(b)}"}
    end
  end

  defp source_changes(was, now) do
    files =
      for name <- Enum.sort(Enum.uniq(Map.keys(was.files) ++ Map.keys(now.files))) do
        case {was.files[name], now.files[name]} do
          {{bytes, _}, {bytes, _}} -> nil
          {nil, _} -> {name, "was not there"}
          {_, nil} -> {name, "is gone"}
          {{a, _}, {b, _}} -> {name, "had #{a} bytes and has #{b}"}
        end
      end

    cond do
      Enum.any?(files) ->
        Enum.reject(files, &is_nil/1)

      was.tensors != now.tensors ->
        [{"the source", "has other tensors"}]

      was.plan != now.plan and was.recipe == now.recipe ->
        [{"config.json", "says something else of some tensors"}]

      true ->
        []
    end
  end

  defp files(paths) do
    Enum.reduce_while(paths, {:ok, %{}}, fn path, {:ok, files} ->
      case path |> Native.file_identity() |> Error.wrap(:source) do
        {:ok, identity} -> {:cont, {:ok, Map.put(files, Path.basename(path), identity)}}
        error -> {:halt, error}
      end
    end)
  end

  defp recipe(%Conversion{} = conversion), do: {:ok, words(Conversion.to_map(conversion))}

  defp recipe(%Recipe{} = recipe) do
    with {:ok, statistics} <- statistics(recipe.statistics) do
      patterns = %{
        include: Enum.map(recipe.include, &inspect/1),
        exclude: Enum.map(recipe.exclude, &inspect/1)
      }

      {:ok,
       recipe
       |> Recipe.to_map()
       |> Map.drop([:settings, :non_finite])
       |> Map.merge(recipe.settings)
       |> Map.merge(patterns)
       |> Map.put(:statistics, statistics)
       |> words()}
    end
  end

  defp statistics(nil), do: {:ok, nil}

  defp statistics(path) when is_binary(path) do
    with {:ok, hash} <- path |> Native.file_hash() |> Error.wrap(:statistics),
         do: {:ok, "content #{Base.encode16(hash, case: :lower)}"}
  end

  # Its file has the same bytes for the same content.
  defp statistics(%Calibration{} = calibration) do
    path = Path.join(System.tmp_dir!(), "viva_tensor-#{System.pid()}-#{System.unique_integer()}")

    try do
      with :ok <- Calibration.save(calibration, path), do: statistics(path)
    after
      File.rm(path)
    end
  end

  defp words(map), do: Map.new(map, fn {key, value} -> {to_string(key), value} end)

  # The keys of a map have another order in every VM, unless asked for.
  defp hash(term), do: :crypto.hash(:sha256, :erlang.term_to_binary(term, [:deterministic]))

  defp show(nil), do: "not given"
  defp show(value) when is_binary(value) or is_atom(value), do: to_string(value)
  defp show([_ | _] = list), do: Enum.map_join(list, " ", &show/1)
  defp show(value), do: inspect(value)
end
