defmodule VivaTensor.Job.Options do
  @moduledoc false
  # The options of a job, checked once, before a process is started for it.

  alias VivaTensor.{Calibration, Conversion, Error, Recipe, Size, Vectors}

  @keys [
    :source,
    :vectors,
    :to,
    :recipe,
    :memory_limit,
    :max_concurrency,
    :max_shard_size,
    :force,
    :resume,
    :unit_timeout,
    :priority,
    :nodes,
    :notify
  ]

  @enforce_keys [:source, :to, :recipe]
  defstruct [
    :source,
    :vectors,
    :to,
    :recipe,
    memory_limit: 512_000_000,
    max_concurrency: nil,
    max_shard_size: 5_000_000_000,
    force: false,
    resume: false,
    unit_timeout: 3_600_000,
    priority: :normal,
    nodes: [],
    notify: nil
  ]

  @typedoc "There is no `source` where the vectors are a stream."
  @type t :: %__MODULE__{
          source: Path.t() | nil,
          vectors: Enumerable.t() | nil,
          to: Path.t(),
          recipe: Recipe.t() | Conversion.t() | Vectors.Recipe.t(),
          memory_limit: pos_integer,
          max_concurrency: pos_integer | nil,
          max_shard_size: pos_integer,
          force: boolean,
          resume: boolean,
          unit_timeout: pos_integer | :infinity,
          priority: :low | :normal | :high,
          nodes: [node] | :connected,
          notify: pid | nil
        }

  @doc "Reads the options of `VivaTensor.Job.start/1`."
  @spec new(keyword) :: {:ok, t} | {:error, Error.t()}
  def new(opts) when is_list(opts) do
    {own, recipe_opts} = Keyword.split(opts, @keys)

    with {:ok, source, vectors} <- sources(own),
         {:ok, to} <- path(own, :to),
         {:ok, memory_limit} <- size(own, :memory_limit, "512MB"),
         {:ok, max_shard_size} <- size(own, :max_shard_size, "5GB"),
         {:ok, max_concurrency} <- concurrency(own),
         {:ok, force} <- flag(own, :force),
         {:ok, resume} <- flag(own, :resume),
         {:ok, unit_timeout} <- unit_timeout(own),
         {:ok, priority} <- priority(own),
         {:ok, nodes} <- nodes(own),
         {:ok, notify} <- notify(own),
         {:ok, recipe} <- recipe(own, recipe_opts),
         :ok <- for_other_nodes(nodes, recipe) do
      {:ok,
       %__MODULE__{
         source: source,
         vectors: vectors,
         to: to,
         recipe: recipe,
         memory_limit: memory_limit,
         max_concurrency: max_concurrency,
         max_shard_size: max_shard_size,
         force: force,
         resume: resume,
         unit_timeout: unit_timeout,
         priority: priority,
         nodes: nodes,
         notify: notify
       }}
    end
  end

  @doc """
  The options that start the same job from any working directory. Statistics that are
  in memory are not among them.
  """
  @spec to_keyword(t) :: keyword
  def to_keyword(%__MODULE__{} = options) do
    [source(options), to: Path.expand(options.to)] ++
      Map.to_list(
        Map.take(options, [
          :memory_limit,
          :max_concurrency,
          :max_shard_size,
          :force,
          :unit_timeout,
          :priority,
          :nodes
        ])
      ) ++ of_recipe(options.recipe)
  end

  @doc "Fails for options that no other VM could start the job with."
  @spec restartable(t) :: :ok | {:error, Error.t()}
  def restartable(%__MODULE__{source: nil}),
    do: invalid(:vectors, "a stream cannot be kept in a queue: write it to a file")

  def restartable(%__MODULE__{}), do: :ok

  # A stream can only be given again.
  defp source(%__MODULE__{source: nil}), do: {:vectors, :stream}
  defp source(%__MODULE__{recipe: %Vectors.Recipe{}} = o), do: {:vectors, Path.expand(o.source)}
  defp source(%__MODULE__{} = options), do: {:source, Path.expand(options.source)}

  defp of_recipe(%Vectors.Recipe{} = recipe), do: Vectors.Recipe.to_options(recipe)

  defp of_recipe(%Conversion{layout: layout, dtype: dtype}), do: [convert: layout, dtype: dtype]
  defp of_recipe(%Recipe{} = recipe), do: Recipe.to_options(recipe)

  @doc "How many units a node does at once."
  @spec workers(t) :: pos_integer
  def workers(%__MODULE__{max_concurrency: nil}), do: System.schedulers_online()
  def workers(%__MODULE__{max_concurrency: n}), do: n

  defp sources(own) do
    case {own[:source], own[:vectors]} do
      {_, nil} ->
        with {:ok, source} <- path(own, :source), do: {:ok, source, nil}

      {nil, :stream} ->
        invalid(:vectors, "what was begun is of a stream, which has to be given again")

      {nil, path} when is_binary(path) ->
        with {:ok, source} <- path(own, :vectors), do: {:ok, source, nil}

      {nil, vectors} ->
        if Enumerable.impl_for(vectors),
          do: {:ok, nil, vectors},
          else:
            invalid(:vectors, "expected a path or a stream of binaries, got #{inspect(vectors)}")

      _ ->
        invalid(:vectors, "is another source; give one of them")
    end
  end

  defp path(own, key) do
    case Keyword.get(own, key) do
      path when is_binary(path) and path != "" -> {:ok, path}
      nil -> invalid(key, "is required")
      other -> invalid(key, "expected a path, got #{inspect(other)}")
    end
  end

  defp size(own, key, default) do
    with {:error, message} <- own |> Keyword.get(key, default) |> Size.parse() do
      invalid(key, message)
    end
  end

  defp concurrency(own) do
    case Keyword.get(own, :max_concurrency) do
      n when (is_integer(n) and n > 0) or is_nil(n) -> {:ok, n}
      other -> invalid(:max_concurrency, "expected a positive integer, got #{inspect(other)}")
    end
  end

  defp flag(own, key) do
    case Keyword.get(own, key, false) do
      value when is_boolean(value) -> {:ok, value}
      other -> invalid(key, "expected true or false, got #{inspect(other)}")
    end
  end

  defp unit_timeout(own) do
    case Keyword.get(own, :unit_timeout, 3_600_000) do
      timeout when timeout == :infinity or (is_integer(timeout) and timeout > 0) ->
        {:ok, timeout}

      other ->
        invalid(:unit_timeout, "expected milliseconds or :infinity, got #{inspect(other)}")
    end
  end

  defp priority(own) do
    case Keyword.get(own, :priority, :normal) do
      priority when priority in [:low, :normal, :high] -> {:ok, priority}
      other -> invalid(:priority, "expected :low, :normal or :high, got #{inspect(other)}")
    end
  end

  defp nodes(own) do
    case Keyword.get(own, :nodes, []) do
      [] ->
        {:ok, []}

      nodes ->
        cond do
          nodes != :connected and not (is_list(nodes) and Enum.all?(nodes, &is_atom/1)) ->
            invalid(:nodes, "expected names of nodes or :connected, got #{inspect(nodes)}")

          not Node.alive?() ->
            invalid(:nodes, "this node has no name that others could connect to: give it one")

          true ->
            {:ok, nodes}
        end
    end
  end

  defp for_other_nodes([], _recipe), do: :ok

  defp for_other_nodes(_nodes, %Recipe{statistics: %Calibration{}}) do
    invalid(:nodes, "other nodes do not have the statistics: save them, and give the file")
  end

  defp for_other_nodes(_nodes, %Vectors.Recipe{}) do
    invalid(:nodes, "vectors come one after the other, and one node does them")
  end

  defp for_other_nodes(_nodes, _recipe), do: :ok

  defp notify(own) do
    case Keyword.get(own, :notify) do
      pid when is_pid(pid) or is_nil(pid) -> {:ok, pid}
      other -> invalid(:notify, "expected a pid, got #{inspect(other)}")
    end
  end

  defp recipe(own, recipe_opts) do
    recipe =
      if own[:vectors],
        do: of_vectors(own[:recipe], recipe_opts),
        else: chosen(own[:recipe], recipe_opts)

    with {:ok, recipe} <- recipe, do: with_statistics(recipe)
  end

  defp of_vectors(nil, opts), do: Vectors.Recipe.new(opts)
  defp of_vectors(%Vectors.Recipe{} = recipe, []), do: {:ok, recipe}

  defp of_vectors(recipe, _opts),
    do: invalid(:recipe, "expected a VivaTensor.Vectors.Recipe by itself, got #{inspect(recipe)}")

  defp chosen(nil, opts) do
    case Keyword.pop(opts, :convert) do
      {nil, opts} -> Recipe.new(opts)
      {layout, opts} -> Conversion.new([layout: layout] ++ opts)
    end
  end

  defp chosen(preset, opts) when is_atom(preset), do: Recipe.new(preset, opts)

  # What was seen may go beside a recipe: it is of one model, a recipe of many.
  defp chosen(%Recipe{} = recipe, statistics: statistics) do
    Recipe.with_statistics(recipe, statistics)
  end

  defp chosen(%kind{} = recipe, []) when kind in [Recipe, Conversion], do: {:ok, recipe}

  defp chosen(%kind{}, [{key, _} | _]) when kind in [Recipe, Conversion] do
    invalid(key, "goes into the recipe, not beside it")
  end

  defp chosen(other, _opts) do
    invalid(
      :recipe,
      "expected a VivaTensor.Recipe, the name of one, or a VivaTensor.Conversion, " <>
        "got #{inspect(other)}"
    )
  end

  defp with_statistics(%Recipe{calibrated: true, statistics: nil} = recipe) do
    invalid(
      :statistics,
      "method #{recipe.settings.method} looks at what the layers of the model meet: give a " <>
        "VivaTensor.Calibration with an entry for each of them, or the file of one, which " <>
        "examples/calibration/record.py writes"
    )
  end

  defp with_statistics(recipe), do: {:ok, recipe}

  defp invalid(option, message), do: Error.option(:job, to_string(option), message)
end
