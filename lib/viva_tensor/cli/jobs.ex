defmodule VivaTensor.CLI.Jobs do
  @moduledoc false
  # The work behind `mix viva.jobs`: jobs of this machine, as the disk tells of them.

  alias VivaTensor.{CLI, Error, Job, Native, Size}
  alias VivaTensor.CLI.{Progress, Style}
  alias VivaTensor.Job.{FileError, Unfinished}

  @behaviour CLI

  @task "viva.jobs"
  @tick_ms 200

  @switches [
    json: :boolean,
    memory_limit: :string,
    threads: :integer,
    nodes: :string,
    non_finite: :string,
    statistics: :string
  ]

  # Each with the flags that it takes besides --json.
  @subcommands %{
    "list" => [],
    "follow" => [],
    "cancel" => [],
    "resume" => [:memory_limit, :threads, :nodes, :non_finite, :statistics],
    "report" => []
  }
  @names ~w(list follow cancel resume report)

  @impl CLI
  def switches, do: @switches

  @doc """
  Reads the subcommand, what it is about and its flags.

      iex> VivaTensor.CLI.Jobs.parse(["list"])
      {:ok, {"list", ".", []}}
      iex> VivaTensor.CLI.Jobs.parse(["resume", "out", "--memory-limit", "1GB"])
      {:ok, {"resume", "out", [memory_limit: "1GB"]}}
      iex> VivaTensor.CLI.Jobs.parse(["report"])
      {:error, "report of which DIR?"}
      iex> VivaTensor.CLI.Jobs.parse(["stop", "out"])
      {:error, "no subcommand \\"stop\\"; there are list, follow, cancel, resume, report"}
  """
  @impl CLI
  @spec parse([String.t()]) ::
          {:ok, {String.t(), Path.t(), keyword}} | :help | {:error, String.t()}
  def parse(argv) do
    case CLI.parse(argv, @switches) do
      {:ok, _flags, []} -> {:error, "which subcommand? There are #{Enum.join(@names, ", ")}"}
      {:ok, flags, [name | rest]} when is_map_key(@subcommands, name) -> check(name, rest, flags)
      {:ok, _flags, [name | _]} -> {:error, CLI.unknown_subcommand(name, @names)}
      other -> other
    end
  end

  defp check(name, rest, flags) do
    case {flags |> Keyword.drop([:json | @subcommands[name]]) |> Keyword.keys(), name, rest} do
      {[flag | _], _, _} ->
        {:error, "#{name} takes no #{CLI.flag(flag)}"}

      {[], "list", []} ->
        {:ok, {name, ".", flags}}

      {[], _, [directory]} ->
        {:ok, {name, directory, flags}}

      {[], _, []} ->
        {:error, "#{name} of which DIR?"}

      {[], _, [_, extra | _]} ->
        {:error, "one DIR at a time; what is #{inspect(extra)}?"}
    end
  end

  @doc "Runs a subcommand. The application must be started."
  @impl CLI
  @spec run({String.t(), Path.t(), keyword}) :: CLI.exit_code()
  def run({"list", directory, flags}) do
    found = Unfinished.list(directory)

    if flags[:json] do
      found |> Enum.map(&to_map/1) |> CLI.json() |> IO.puts()
    else
      IO.write(table(found, directory))
    end

    0
  end

  def run({"follow", to, flags}) do
    with {:ok, unfinished} <- running(to) do
      follow(unfinished, Progress.new(), now())
      run({"report", to, flags})
    else
      {:error, error} -> CLI.failure(@task, error, flags)
    end
  end

  def run({"cancel", to, flags}) do
    with {:ok, unfinished} <- running(to),
         request = Unfinished.cancel_request(unfinished.directory),
         :ok <- request |> File.write("") |> FileError.wrap(:output, request) do
      wait(unfinished)

      if flags[:json],
        do: IO.puts(CLI.json(%{stopped: to})),
        else: IO.puts("#{to}: stopped; mix viva.jobs resume #{to} goes on")

      0
    else
      {:error, error} -> CLI.failure(@task, error, flags)
    end
  end

  def run({"resume", to, flags}) do
    options =
      for {key, value} <- Keyword.drop(flags, [:json, :threads, :nodes]) do
        {key, if(key == :non_finite, do: String.to_atom(value), else: value)}
      end

    CLI.Job.show(@task, &Job.resume(to, [notify: &1] ++ options ++ &2), flags)
  end

  def run({"report", to, flags}) do
    with {:ok, json} <- report(to),
         {:ok, report} <- json |> Native.json_decode() |> Error.wrap(:output) do
      if flags[:json], do: IO.write(json), else: IO.write(summary(report))
      if report["quarantined"] in [nil, []], do: 0, else: 1
    else
      {:error, error} -> CLI.failure(@task, error, flags)
    end
  end

  defp running(to) do
    with {:ok, unfinished} <- Unfinished.of(to) do
      if unfinished.running do
        {:ok, unfinished}
      else
        message = "no job is writing #{to} now; mix viva.jobs resume #{to} goes on with it"
        {:error, Error.new(:job, {:no_job, %{reason: message}}, message)}
      end
    end
  end

  defp follow(unfinished, progress, started) do
    seconds = (now() - started) / 1000
    rate = if seconds > 0, do: unfinished.bytes_done / seconds, else: 0.0

    status = %{
      state: :running,
      tensors: unfinished.tensors,
      tensors_done: unfinished.tensors_done,
      bytes: unfinished.bytes,
      bytes_done: unfinished.bytes_done,
      bytes_per_second: rate,
      eta_seconds: if(rate > 0, do: (unfinished.bytes - unfinished.bytes_done) / rate)
    }

    progress = Progress.show(progress, status)
    Process.sleep(@tick_ms)

    case Unfinished.of(unfinished.to) do
      {:ok, %{running: true} = unfinished} -> follow(unfinished, progress, started)
      _ -> Progress.finish(progress)
    end
  end

  defp wait(unfinished) do
    if Native.output_locked(unfinished.directory) do
      Process.sleep(@tick_ms)
      wait(unfinished)
    end
  end

  defp now, do: System.monotonic_time(:millisecond)

  defp report(to) do
    path = CLI.Report.file(to)
    path |> File.read() |> FileError.wrap(:output, path)
  end

  defp table([], directory), do: "no unfinished job in #{directory}\n"

  defp table(found, _directory) do
    columns = [
      {"output", :left},
      {"state", :left},
      {"as", :left},
      {"tensors", :right},
      {"done", :right},
      {"of", :right},
      {"source", :left}
    ]

    Style.table(
      columns,
      for u <- found do
        [
          u.to,
          state(u),
          Unfinished.what(u),
          "#{u.tensors_done}/#{u.tensors}",
          Size.format(u.bytes_done),
          Size.format(u.bytes),
          u.options[:source] || to_string(u.options[:vectors])
        ]
      end
    )
  end

  defp state(%{running: true}), do: "running"
  defp state(_unfinished), do: "unfinished"

  defp to_map(unfinished) do
    unfinished
    |> Map.from_struct()
    |> Map.drop([:options, :running])
    |> Map.merge(%{
      state: state(unfinished),
      as: Unfinished.what(unfinished),
      source: unfinished.options[:source] || unfinished.options[:vectors]
    })
  end

  defp summary(%{"vectors" => vectors} = report) do
    [
      "#{report["source"]} -> #{report["target"]}\n",
      "vectors    #{vectors}, #{Size.format(report["input_bytes"])} -> " <>
        "#{Size.format(report["codes_bytes"])} of codes\n",
      for(%{"rescored" => found} <- [report["recall"]], found, do: "recall     #{found}\n")
    ]
  end

  defp summary(report) do
    aside = report["quarantined"] || []

    [
      "#{report["source"]} -> #{report["target"]}\n",
      "on disk    #{Size.format(report["input_bytes"])} -> #{Size.format(report["output_bytes"])}\n",
      "tensors    #{length(report["tensors"])}, #{report["quantized"]} quantized\n",
      for(%{"name" => name, "reason" => why} <- aside, do: "put aside  #{name}: #{why}\n")
    ]
  end
end
