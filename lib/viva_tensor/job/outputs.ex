defmodule VivaTensor.Job.Outputs do
  @moduledoc false
  # Opens the unfinished outputs of jobs and lets go of those whose job dies.
  #
  # A job that ends in order commits or closes its own output. A job that is killed
  # cannot, so this process, which stands above all jobs, watches them: what they
  # recorded stays for a job that goes on with it, and what is not recorded goes.
  #
  # A file `.NAME.cancel` beside an output, which `mix viva.jobs cancel` makes, cancels the
  # job that writes it, whichever process that is.

  use GenServer

  alias VivaTensor.{Error, Native}
  alias VivaTensor.Job.{Options, Unfinished}

  @look_ms 500

  @typedoc "What an earlier job left, and the path of its manifest."
  @type found :: {:nothing | :unfinished | :published, Path.t()}

  @doc false
  def start_link(_), do: GenServer.start_link(__MODULE__, [], name: __MODULE__)

  @doc """
  Opens the output of a job for the calling process: a hidden sibling of its target.
  `protected` paths are never overwritten, an existing target only with `force`, and
  what an earlier job left only with `force` or to go on with it.
  """
  @spec open(Options.t(), [Path.t()]) :: {:ok, reference, found} | {:error, Error.t()}
  def open(options, protected) do
    GenServer.call(__MODULE__, {:open, options, protected}, :infinity)
  end

  @impl true
  def init(_) do
    Process.flag(:trap_exit, true)
    Process.send_after(self(), :look, @look_ms)
    {:ok, %{}}
  end

  @impl true
  def handle_call({:open, options, protected}, {pid, _}, outputs) do
    case output(options, protected) do
      {:ok, output, {_, manifest} = found} ->
        request = Unfinished.cancel_request(Path.dirname(manifest))
        File.rm(request)
        outputs = Map.put(outputs, Process.monitor(pid), {output, pid, request})
        {:reply, {:ok, output, found}, outputs}

      {:error, error} ->
        {:reply, {:error, error}, outputs}
    end
  end

  @impl true
  def handle_info({:DOWN, monitor, :process, _pid, _reason}, outputs) do
    {{output, _pid, _request}, outputs} = Map.pop(outputs, monitor)
    # Of an output that its job has committed or closed, nothing is left to do.
    Native.output_release(output)
    {:noreply, outputs}
  end

  def handle_info(:look, outputs) do
    for {_monitor, {_output, pid, request}} <- outputs, File.exists?(request) do
      :gen_statem.cast(pid, :cancel)
    end

    for {_monitor, {_output, _pid, request}} <- outputs, do: File.rm(request)
    Process.send_after(self(), :look, @look_ms)
    {:noreply, outputs}
  end

  def handle_info({:EXIT, _pid, _reason}, outputs), do: {:noreply, outputs}

  @impl true
  def terminate(_reason, outputs) do
    for {_monitor, {output, _pid, _request}} <- outputs, do: Native.output_release(output)
  end

  defp output(%{force: true, resume: false} = options, protected) do
    with {:ok, output} <-
           options.to |> Native.output_create(true, protected) |> Error.wrap(:output),
         do: found(output)
  end

  defp output(options, protected) do
    with {:ok, output} <-
           options.to |> Native.output_open(options.force, protected) |> Error.wrap(:output),
         {:ok, output, found} <- found(output) do
      case found do
        {:published, _} when not options.resume ->
          # Only cleaning up was left to do; then it is like any other target.
          with {:ok, _} <- output |> Native.output_commit() |> Error.wrap(:output),
               do: output(options, protected)

        {:unfinished, manifest} when not options.resume ->
          Native.output_release(output)
          {:error, unfinished(options.to, manifest)}

        _ ->
          {:ok, output, found}
      end
    end
  end

  defp found(output) do
    with {:ok, found} <- output |> Native.output_found() |> Error.wrap(:output),
         do: {:ok, output, found}
  end

  defp unfinished(to, manifest) do
    directory = Path.dirname(manifest)

    Error.new(
      :output,
      {:unfinished, %{path: directory}},
      "an earlier job left #{to} unfinished, in #{directory}: use --resume to go on with it, " <>
        "or --force to begin again"
    )
  end
end
