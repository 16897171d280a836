defmodule VivaTensor.CLI.Job do
  @moduledoc false
  # What the tasks that run a job have in common: its progress, its report, the
  # signals that cancel it.

  alias VivaTensor.{CLI, Error, Job}
  alias VivaTensor.CLI.{Nodes, Progress}
  alias VivaTensor.Job.{Events, Failure}

  @tick_ms 100
  @signals [:sigterm, :sighup, :sigquit]
  @last_words_ms 1_000

  @switches [
    to: :string,
    memory_limit: :string,
    max_shard_size: :string,
    threads: :integer,
    nodes: :string,
    force: :boolean,
    resume: :boolean,
    json: :boolean
  ]

  @doc "The switches of a task, its own and those that every job takes."
  @spec switches(keyword) :: keyword
  def switches(own), do: own ++ @switches

  @doc "Reads the flags of a task, with the SOURCE that they are about."
  @spec parse([String.t()], keyword) :: {:ok, keyword} | :help | {:error, String.t()}
  def parse(argv, switches) do
    case CLI.parse(argv, switches) do
      {:ok, flags, [source]} ->
        required([source: source] ++ flags)

      {:ok, _flags, []} ->
        {:error, "which SOURCE?"}

      {:ok, _flags, [_, extra | _]} ->
        {:error, "one SOURCE at a time; what is #{inspect(extra)}?"}

      other ->
        other
    end
  end

  defp required(flags) do
    cond do
      flags[:to] == nil -> {:error, "--to DIR is missing"}
      flags[:threads] != nil and flags[:threads] < 1 -> {:error, "--threads must be at least 1"}
      flags[:nodes] == nil -> {:ok, flags}
      true -> with {:ok, _} <- Nodes.parse(flags[:nodes]), do: {:ok, flags}
    end
  end

  @doc "Runs a job and shows what becomes of it. The application must be started."
  @spec run(String.t(), keyword, keyword) :: CLI.exit_code()
  def run(task, options, flags) do
    options = Keyword.drop(options, [:json, :threads, :nodes])
    show(task, &Job.start([notify: &1] ++ options ++ &2), flags)
  end

  @doc """
  Shows what becomes of a job that `start` starts, for a process to keep informed and with
  options that the flags add.
  """
  @spec show(
          String.t(),
          (pid, keyword -> {:ok, Job.job()} | {:error, Error.t()}),
          keyword
        ) :: CLI.exit_code()
  def show(task, start, flags) do
    # The progress says it; standard output is for the report.
    Logger.put_module_level(Events, :warning)

    with {:ok, _} <- threads(flags[:threads]),
         {:ok, nodes} <- Nodes.option(flags),
         {:ok, job} <- start.(self(), nodes) do
      progress = Progress.new()
      monitor = Process.monitor(job)
      trap_signals(job)
      {result, progress} = follow(job, progress)
      untrap_signals(result)
      Process.demonitor(monitor, [:flush])
      Progress.finish(progress)
      finish(result, task, flags)
    else
      {:error, error} -> CLI.failure(task, error, flags)
    end
  after
    Logger.delete_module_level(Events)
  end

  defp threads(nil), do: {:ok, nil}
  defp threads(threads), do: VivaTensor.Application.configure_threads(threads)

  defp follow(job, progress) do
    receive do
      {:viva_tensor_job, ^job, {:done, result}} ->
        {result, progress}

      {:viva_tensor_job, ^job, {:retry, retry}} ->
        Progress.finish(progress)
        IO.puts(:stderr, "#{retry.work}: #{Failure.text(retry.reason)}; attempt #{retry.attempt}")
        follow(job, progress)

      {:viva_tensor_job, ^job, {:redo, %{name: name}}} ->
        Progress.finish(progress)
        IO.puts(:stderr, "#{name}: not as it was recorded, done again")
        follow(job, progress)

      {:viva_tensor_job, ^job, {:node, %{node: node, state: state, reason: reason}}} ->
        Progress.finish(progress)

        IO.puts(
          :stderr,
          Enum.join([node, ": ", state] ++ for(why <- List.wrap(reason), do: ", " <> why))
        )

        follow(job, progress)

      {:viva_tensor_job, ^job, {:kept, kept}} ->
        Progress.finish(progress)
        IO.puts(:stderr, "#{kept.name}: kept, #{kept.reason}")
        follow(job, progress)

      {:viva_tensor_job, ^job, _event} ->
        follow(job, progress)

      {:DOWN, _monitor, :process, ^job, reason} ->
        {{:error, Job.gone(reason)}, progress}
    after
      @tick_ms ->
        case Job.status(job) do
          {:ok, status} -> follow(job, Progress.show(progress, status))
          {:error, _} -> follow(job, progress)
        end
    end
  end

  # The BEAM keeps Ctrl-C for itself. SIGTERM, SIGHUP and SIGQUIT (Ctrl-\) cancel
  # the job, and the node goes down when that is done and said.
  defp trap_signals(job) do
    task = self()

    for signal <- @signals do
      System.trap_signal(signal, {__MODULE__, signal}, fn ->
        Job.cancel(job)
        monitor = Process.monitor(task)

        receive do
          {:DOWN, ^monitor, :process, ^task, _reason} -> :ok
        after
          @last_words_ms -> :ok
        end

        # Not from here: a trap returns, and what the node does by default comes next.
        spawn(System, :halt, [130])
        Process.sleep(@last_words_ms)
      end)
    end
  end

  # A trap that is running waits for this process, so it cannot be removed.
  defp untrap_signals({:error, %Error{reason: {:cancelled, _}}}), do: :ok

  defp untrap_signals(_result) do
    Enum.each(@signals, &System.untrap_signal(&1, {__MODULE__, &1}))
  end

  defp finish({:ok, report}, _task, flags) do
    print(report, flags)
    0
  end

  defp finish({:partial, report}, task, flags) do
    print(report, flags)

    for %{name: name, reason: reason} <- report.quarantined do
      CLI.say(task, "#{name}: #{reason}")
    end

    CLI.say(
      task,
      "nothing was published; what is done is kept, and --resume tries the rest " <>
        "again (--non-finite keep leaves weights with NaN as they are)"
    )

    1
  end

  defp finish({:error, error}, task, flags), do: CLI.failure(task, error, flags)

  defp print(%kind{} = report, flags) do
    if flags[:json] do
      IO.puts(CLI.json(kind.to_map(report)))
    else
      IO.puts(kind.table(report))
    end
  end
end
