defmodule VivaTensor.Job.Outputs do
  @moduledoc """
  Creates the temporary outputs of jobs and removes those whose job dies.

  A job that ends in order removes its own output. A job that is killed cannot,
  so this process, which stands above all jobs, watches them and cleans up. It
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

  @doc "Gives the output its final name and stops watching the caller."
  @spec commit(reference) :: {:ok, Path.t()} | {:error, Error.t()}
  def commit(output) do
    with {:ok, path} <- output |> Native.output_commit() |> Error.wrap(:output) do
      GenServer.call(__MODULE__, :forget, :infinity)
      {:ok, path}
    end
  end

  @doc "Removes the output of the calling process."
  @spec discard() :: :ok
  def discard, do: GenServer.call(__MODULE__, :discard, :infinity)

  @impl true
  def init(_) do
    Process.flag(:trap_exit, true)
    {:ok, %{}}
  end

  @impl true
  def handle_call({:create, target, force?, protected, cancel}, {pid, _}, outputs) do
    case target |> Native.output_create(force?, protected) |> Error.wrap(:output) do
      {:ok, output} ->
        {:reply, {:ok, output}, Map.put(outputs, pid, {Process.monitor(pid), output, cancel})}

      error ->
        {:reply, error, outputs}
    end
  end

  def handle_call(:discard, {pid, _}, outputs), do: {:reply, :ok, remove(outputs, pid)}
  def handle_call(:forget, {pid, _}, outputs), do: {:reply, :ok, elem(forget(outputs, pid), 1)}

  @impl true
  def handle_info({:DOWN, _monitor, :process, pid, _reason}, outputs) do
    {:noreply, remove(outputs, pid)}
  end

  def handle_info({:EXIT, _pid, _reason}, outputs), do: {:noreply, outputs}

  @impl true
  def terminate(_reason, outputs) do
    Enum.each(Map.keys(outputs), &remove(outputs, &1))
  end

  defp remove(outputs, pid) do
    {watched, outputs} = forget(outputs, pid)

    with {output, cancel} <- watched do
      Native.cancel(cancel)
      Native.output_abort(output)
    end

    outputs
  end

  defp forget(outputs, pid) do
    case Map.pop(outputs, pid) do
      {nil, outputs} ->
        {nil, outputs}

      {{monitor, output, cancel}, outputs} ->
        Process.demonitor(monitor, [:flush])
        {{output, cancel}, outputs}
    end
  end
end
