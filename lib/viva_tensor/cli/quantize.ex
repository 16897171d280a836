defmodule VivaTensor.CLI.Quantize do
  @moduledoc """
  The work behind `mix viva.quantize`: flags to a job, its progress, its report.
  """

  alias VivaTensor.{CLI, Error, Job, Report}
  alias VivaTensor.CLI.Progress

  @task "viva.quantize"
  @tick_ms 100
  @signals [:sigterm, :sighup, :sigquit]
  @last_words_ms 1_000

  @switches [
    to: :string,
    format: :string,
    method: :string,
    block_size: :integer,
    double_quant: :boolean,
    values: :string,
    layout: :string,
    include: [:string, :keep],
    exclude: [:string, :keep],
    non_finite: :string,
    memory_limit: :string,
    max_shard_size: :string,
    threads: :integer,
    force: :boolean,
    json: :boolean
  ]

  # Options whose values the library takes as atoms.
  @names [:format, :method, :values, :layout, :non_finite]

  @doc "Reads the flags: everything about them that needs no running application."
  @spec parse([String.t()]) :: {:ok, keyword} | :help | {:error, String.t()}
  def parse(argv) do
    case CLI.parse(argv, @switches) do
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
      flags[:format] == nil -> {:error, "--format is missing, for example --format nf4"}
      flags[:threads] != nil and flags[:threads] < 1 -> {:error, "--threads must be at least 1"}
      true -> {:ok, flags}
    end
  end

  @doc "Runs the job that the flags ask for. The application must be started."
  @spec run(keyword) :: CLI.exit_code()
  def run(flags) do
    with {:ok, _} <- threads(flags[:threads]),
         {:ok, job} <- Job.start([notify: self()] ++ job_options(flags)) do
      progress = Progress.new()
      monitor = Process.monitor(job)
      trap_signals(job)
      {result, progress} = follow(job, progress)
      untrap_signals(result)
      Process.demonitor(monitor, [:flush])
      Progress.finish(progress)
      finish(result, flags)
    else
      {:error, error} -> CLI.failure(@task, error, flags)
    end
  end

  defp threads(nil), do: {:ok, nil}
  defp threads(threads), do: VivaTensor.Application.configure_threads(threads)

  defp job_options(flags) do
    plain =
      flags
      |> Keyword.drop([:json, :threads, :include, :exclude])
      |> Enum.map(fn
        {key, value} when key in @names -> {key, String.to_atom(value)}
        option -> option
      end)

    plain ++
      [
        include: Keyword.get_values(flags, :include),
        exclude: Keyword.get_values(flags, :exclude)
      ]
  end

  defp follow(job, progress) do
    receive do
      {:viva_tensor_job, ^job, {:done, result}} ->
        {result, progress}

      {:viva_tensor_job, ^job, {:retry, retry}} ->
        Progress.finish(progress)
        IO.puts(:stderr, "#{retry.work}: its worker died, attempt #{retry.attempt}")
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

  defp finish({:ok, report}, flags) do
    if flags[:json] do
      IO.puts(CLI.json(Report.to_map(report)))
    else
      IO.puts(Report.table(report))
    end

    0
  end

  defp finish({:error, error}, flags), do: CLI.failure(@task, error, flags)
end
