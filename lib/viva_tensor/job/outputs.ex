defmodule VivaTensor.Job.Outputs do
  @moduledoc """
  Creates the temporary outputs of jobs and removes those whose job dies.

  A job that ends in order commits or removes its own output. A job that is killed
  cannot, so this process, which stands above all jobs, watches them and cleans up. It
  also raises the job's cancel flag: workers that outlive their job are inside a
  native call, and leave it soon after.
  """

  use GenServer

  alias VivaTensor.{Error, Native}

  @doc false
  def start_link(_), do: GenServer.start_link(__MODULE__, [], name: __MODULE__)

  @doc """
  Creates a temporary sibling of `target` for the calling process. `protected`
  paths are never overwritten, and an existing target only with `force?`.
  """
  @spec create(Path.t(), boolean, [Path.t()], reference) :: {:ok, reference} | {:error, Error.t()}
  def create(target, force?, protected, cancel) do
    GenServer.call(__MODULE__, {:create, target, force?, protected, cancel}, :infinity)
  end

  @impl true
  def init(_) do
    Process.flag(:trap_exit, true)
    {:ok, %{}}
  end

  @impl true
  def handle_call({:create, target, force?, protected, cancel}, {pid, _}, outputs) do
    result = target |> Native.output_create(force?, protected) |> Error.wrap(:output)

    outputs =
      case result do
        {:ok, output} -> Map.put(outputs, Process.monitor(pid), {output, cancel})
        {:error, _} -> outputs
      end

    {:reply, result, outputs}
  end

  @impl true
  def handle_info({:DOWN, monitor, :process, _pid, _reason}, outputs) do
    {watched, outputs} = Map.pop(outputs, monitor)
    remove(watched)
    {:noreply, outputs}
  end

  def handle_info({:EXIT, _pid, _reason}, outputs), do: {:noreply, outputs}

  @impl true
  def terminate(_reason, outputs), do: outputs |> Map.values() |> Enum.each(&remove/1)

  # Of an output that its job has committed or removed, nothing is left to remove.
  defp remove({output, cancel}) do
    Native.cancel(cancel)
    Native.output_abort(output)
  end
end
