defmodule VivaTensor.Telemetry do
  @moduledoc """
  Events of jobs and units, for those who watch.

  Handlers attached here always run. Where the `:telemetry` application was
  started before this one, every event goes to it as well, so handlers attached
  with `:telemetry.attach/4` see the same events.

  | event | measurements | metadata |
  |---|---|---|
  | `[:viva_tensor, :job, :start]` | `system_time` | `job`, `source`, `to`, `format` (`nil` for a conversion, the codes of vectors), `layout` |
  | `[:viva_tensor, :job, :stop]` | `duration`, `input_bytes`, `output_bytes` | as above, and `quarantined`, a count |
  | `[:viva_tensor, :job, :exception]` | `duration` | as above, and `error` |
  | `[:viva_tensor, :unit, :start]` | `system_time` | `job`, `name`, `rows` (`{first, after_last}` of a huge tensor), `action`, `attempt` |
  | `[:viva_tensor, :unit, :stop]` | `duration`, `input_bytes`, `output_bytes` | as above |
  | `[:viva_tensor, :unit, :exception]` | `duration` (0 when the worker died or was too slow) | as above, and `error` or `crash` |
  | `[:viva_tensor, :unit, :quarantine]` | `attempts` | `job`, `name`, `reason`, `attempts` |

  Tensors of a few kilobytes that are kept are done many in a row: all of these start before
  the first of them stops, and each has its own `duration`, which is in native time units.

  Job events are executed in the job's process and unit events in the worker's, except for
  the crash of a worker, which only its job can report. A handler that raises is detached
  and logged.
  """

  require Logger

  @type event :: [atom]
  @type handler :: (event, measurements :: map, metadata :: map, config :: term -> term)

  @table __MODULE__

  @doc false
  @spec init() :: :ok
  def init do
    :ets.new(@table, [:duplicate_bag, :named_table, :public, read_concurrency: true])
    started? = List.keymember?(Application.started_applications(), :telemetry, 0)
    :ets.insert(@table, {:telemetry, started?})
    :ok
  end

  @doc """
  Calls `handler` for each of `events`, under an id that `detach/1` takes.

      iex> VivaTensor.Telemetry.attach("doc", [[:viva_tensor, :doc]], fn _, m, _, to -> send(to, m) end, self())
      :ok
      iex> VivaTensor.Telemetry.execute([:viva_tensor, :doc], %{bytes: 1}, %{})
      iex> receive do m -> m end
      %{bytes: 1}
      iex> VivaTensor.Telemetry.detach("doc")
      :ok
  """
  @spec attach(term, [event], handler, term) :: :ok | {:error, :already_exists}
  def attach(id, events, handler, config \\ nil) when is_function(handler, 4) do
    case :ets.match(@table, {:_, id, :_, :_}, 1) do
      :"$end_of_table" ->
        :ets.insert(@table, for(event <- events, do: {event, id, handler, config}))
        :ok

      _ ->
        {:error, :already_exists}
    end
  end

  @doc "Removes the handlers attached under `id`."
  @spec detach(term) :: :ok
  def detach(id) do
    :ets.match_delete(@table, {:_, id, :_, :_})
    :ok
  end

  @doc "Runs every handler of `event` in the calling process."
  @spec execute(event, map, map) :: :ok
  def execute(event, measurements, metadata) do
    for {_, id, handler, config} <- :ets.lookup(@table, event) do
      try do
        handler.(event, measurements, metadata, config)
      catch
        kind, reason ->
          detach(id)

          Logger.error(
            "telemetry handler #{inspect(id)} was detached: " <>
              Exception.format(kind, reason, __STACKTRACE__)
          )
      end
    end

    if :ets.lookup_element(@table, :telemetry, 2) == [true] do
      apply(:telemetry, :execute, [event, measurements, metadata])
    end

    :ok
  end
end
