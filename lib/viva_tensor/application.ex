defmodule VivaTensor.Application do
  @moduledoc """
  The supervision tree.

      VivaTensor.Supervisor (rest_for_one)
      |-- VivaTensor.Job.Workers      Task.Supervisor: one process for each running unit
      |-- VivaTensor.Job.Admission    bytes in flight, over all jobs of the node
      |-- VivaTensor.Job.Outputs      lets go of the unfinished output of a job that dies
      |-- VivaTensor.Job.Supervisor   one state machine for each job
      `-- VivaTensor.Job.Queue        jobs that wait, on disk; only if it is configured

  A job relies on what stands above it, so the loss of any of those takes the
  jobs down with it; what they recorded stays.

  The native thread pool has `config :viva_tensor, threads: n` threads, or
  `VIVA_TENSOR_THREADS`, or else one for each scheduler that is online.
  """

  use Application

  alias VivaTensor.{Error, Native, Telemetry}

  @impl true
  def start(_type, _args) do
    with {:ok, _} <- configure_threads(threads()) do
      Telemetry.init()

      children = [
        {Task.Supervisor, name: VivaTensor.Job.Workers},
        VivaTensor.Job.Admission,
        VivaTensor.Job.Outputs,
        {DynamicSupervisor, name: VivaTensor.Job.Supervisor, strategy: :one_for_one}
      ]

      queue =
        case Application.get_env(:viva_tensor, :queue) do
          nil -> []
          options -> [{VivaTensor.Job.Queue, options}]
        end

      Supervisor.start_link(children ++ queue,
        strategy: :rest_for_one,
        name: VivaTensor.Supervisor
      )
    end
  end

  @doc """
  Sets the number of native threads that all jobs and operations share.

      iex> %{threads: threads} = VivaTensor.cpu()
      iex> VivaTensor.Application.configure_threads(threads)
      {:ok, threads}
  """
  @spec configure_threads(pos_integer) :: {:ok, pos_integer} | {:error, Error.t()}
  def configure_threads(threads) do
    threads |> Native.configure() |> Error.wrap(:configure)
  end

  defp threads do
    case Application.get_env(:viva_tensor, :threads) || System.get_env("VIVA_TENSOR_THREADS") do
      unset when unset in [nil, ""] -> System.schedulers_online()
      threads -> count(threads) || raise ArgumentError, no_count(threads)
    end
  end

  defp count(threads) when is_integer(threads) and threads > 0, do: threads

  defp count(text) when is_binary(text) do
    case Integer.parse(text) do
      {threads, ""} when threads > 0 -> threads
      _ -> nil
    end
  end

  defp count(_other), do: nil

  defp no_count(threads) do
    "config :viva_tensor, threads: and VIVA_TENSOR_THREADS take a positive integer, " <>
      "got #{inspect(threads)}"
  end
end
