defmodule VivaTensor.Job.Queue do
  @moduledoc """
  Jobs that wait for their turn, and are not forgotten when the node ends.

      config :viva_tensor, queue: [path: "jobs.queue", at_once: 2]

  has the application keep one, which `VivaTensor.Job.enqueue/1` adds to. What is added
  is synced to the file before that returns. Jobs of a higher priority come first, and
  `at_once` run at a time; those that ran when the node ended are gone on with when it is
  back, before any other.

  The file has records, as the manifest of a job does: `{:added, id, options}` and
  `{:ended, id, outcome}`.
  """

  use GenServer

  alias VivaTensor.{Error, Job}
  alias VivaTensor.Job.{FileError, Manifest, Options}

  @ranks %{high: 0, normal: 1, low: 2}

  @typedoc """
  `outcome` is `:ok`, `:partial` or why it failed, `nil` before the end.
  """
  @type entry :: %{
          id: pos_integer,
          state: :waiting | :running | :ended,
          options: keyword,
          outcome: :ok | :partial | String.t() | nil
        }

  @doc "Starts a queue: `path:`, `at_once:` (2) and `name:`."
  @spec start_link(keyword) :: GenServer.on_start()
  def start_link(opts) do
    opts = Keyword.validate!(opts, [:path, at_once: 2, name: __MODULE__])
    GenServer.start_link(__MODULE__, opts, name: opts[:name])
  end

  @doc "Adds a job with the options of `VivaTensor.Job.start/1`; `:notify` is of no use here."
  @spec add(GenServer.server(), keyword) :: {:ok, pos_integer} | {:error, Error.t()}
  def add(queue \\ __MODULE__, opts) do
    with {:ok, options} <- Options.new(opts),
         :ok <- Options.restartable(options) do
      call(queue, {:add, Options.to_keyword(options)})
    end
  end

  @doc "All jobs since the queue was started, and those that it found waiting then."
  @spec list(GenServer.server()) :: {:ok, [entry]} | {:error, Error.t()}
  def list(queue \\ __MODULE__), do: call(queue, :list)

  defp call(queue, request) do
    GenServer.call(queue, request, :infinity)
  catch
    :exit, {:noproc, _} ->
      message = "there is no queue; set config :viva_tensor, queue: [path: \"jobs.queue\"]"
      {:error, Error.new(:job, {:no_queue, %{}}, message)}
  end

  @impl true
  def init(opts) do
    # Jobs end with the queue, so that the next one finds their outputs free.
    Process.flag(:trap_exit, true)
    path = opts[:path]

    with {:ok, entries} <- entries(path),
         {:ok, file} <- begin(path, entries) do
      last = entries |> Map.keys() |> Enum.max(fn -> 0 end)
      state = %{file: file, path: path, at_once: opts[:at_once], last: last}
      {:ok, Map.merge(state, %{entries: entries, jobs: %{}}), {:continue, :go_on}}
    else
      {:error, error} -> {:stop, error}
    end
  end

  @impl true
  def handle_continue(:go_on, state), do: {:noreply, go_on(state)}

  @impl true
  def handle_call({:add, options}, _from, state) do
    id = state.last + 1

    case append(state, {:added, id, options}) do
      :ok ->
        state = put_in(%{state | last: id}.entries[id], entry(id, options))
        {:reply, {:ok, id}, go_on(state)}

      error ->
        {:reply, error, state}
    end
  end

  def handle_call(:list, _from, state) do
    {:reply, {:ok, state.entries |> Enum.sort() |> Enum.map(&elem(&1, 1))}, state}
  end

  @impl true
  def handle_info({:viva_tensor_job, job, {:done, result}}, state) do
    {:noreply, ended(job, outcome(result), state)}
  end

  def handle_info({:viva_tensor_job, _job, _event}, state), do: {:noreply, state}

  def handle_info({:EXIT, job, reason}, state) when is_map_key(state.jobs, job) do
    {:noreply, ended(job, inspect(reason), state)}
  end

  # Jobs that ended are gone after a while.
  def handle_info({:EXIT, _pid, _reason}, state), do: {:noreply, state}

  defp go_on(state) do
    case waiting(state) do
      [entry | _] when map_size(state.jobs) < state.at_once -> entry |> start(state) |> go_on()
      _ -> state
    end
  end

  defp waiting(state) do
    state.entries
    |> Map.values()
    |> Enum.filter(&(&1.state == :waiting))
    |> Enum.sort_by(&{@ranks[&1.options[:priority]], &1.id})
  end

  defp start(%{id: id} = entry, state) do
    case Job.start_link([notify: self(), resume: true] ++ entry.options) do
      {:ok, job} ->
        state = put_in(state.jobs[job], id)
        put_in(state.entries[id], %{entry | state: :running})

      {:error, error} ->
        close(id, outcome({:error, error}), state)
    end
  end

  defp ended(job, outcome, state) do
    {id, jobs} = Map.pop!(state.jobs, job)
    id |> close(outcome, %{state | jobs: jobs}) |> go_on()
  end

  defp close(id, outcome, state) do
    # If this is lost, the job is found complete, or is gone on with.
    append(state, {:ended, id, outcome})
    update_in(state.entries[id], &%{&1 | state: :ended, outcome: outcome})
  end

  defp outcome({:ok, _report}), do: :ok
  defp outcome({:partial, _report}), do: :partial
  defp outcome({:error, error}), do: Exception.message(error)

  defp entry(id, options), do: %{id: id, state: :waiting, options: options, outcome: nil}

  # The file

  defp entries(path) do
    if File.exists?(path) do
      with {:ok, records, _at} <- Manifest.read(path) do
        {:ok,
         Enum.reduce(records, %{}, fn
           {:added, id, options}, entries -> Map.put(entries, id, entry(id, options))
           {:ended, id, _outcome}, entries -> Map.delete(entries, id)
         end)}
      end
    else
      {:ok, %{}}
    end
  end

  # What ended is left out, and so is what was torn.
  defp begin(path, entries) do
    records = for {id, entry} <- Enum.sort(entries), do: {:added, id, entry.options}
    next = path <> ".next"

    result =
      with :ok <- File.mkdir_p(Path.dirname(path)),
           {:ok, file} <- :file.open(next, [:write, :raw, :binary]),
           :ok <- :file.write(file, [Manifest.head(), Manifest.encode(records)]),
           :ok <- :file.sync(file),
           :ok <- File.rename(next, path),
           do: {:ok, file}

    FileError.wrap(result, :output, path)
  end

  defp append(state, record) do
    with :ok <- :file.write(state.file, Manifest.encode([record])),
         :ok <- :file.datasync(state.file) do
      :ok
    else
      error -> FileError.wrap(error, :output, state.path)
    end
  end
end
