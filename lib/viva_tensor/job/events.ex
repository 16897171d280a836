defmodule VivaTensor.Job.Events do
  @moduledoc false
  # What a job tells others: messages to the processes that it keeps informed, a
  # line in the log for each unit, and telemetry. All of it is called in the job's process.

  alias VivaTensor.{Error, Job, Report, Telemetry}
  alias VivaTensor.Job.{Members, Options, Step, Unit}

  require Logger

  @type job :: %{
          required(:options) => Options.t(),
          required(:subscribers) => [pid],
          optional(any) => any
        }

  @doc "Tells the processes that want to know."
  @spec notify(job, term) :: :ok
  def notify(%{subscribers: pids}, event) do
    for pid <- pids, do: send(pid, {:viva_tensor_job, self(), event})
    :ok
  end

  @doc """
  A unit is done: a message, and a line in the log whose words and metadata say the same.
  """
  @spec unit_done(job, Step.t(), Report.row()) :: :ok
  def unit_done(job, step, row) do
    milliseconds = System.convert_time_unit(step.ended - step.started, :native, :millisecond)

    fields =
      [unit: row.name, to: job.options.to, action: row.action, format: row.format] ++
        [input_bytes: row.input_bytes, output_bytes: row.output_bytes] ++
        [milliseconds: milliseconds, attempt: step.attempt, node: step.node] ++
        [sqnr_db: row[:sqnr_db]]

    fields = for {key, value} <- fields, value != nil, do: {key, value}
    Logger.debug(fn -> {Enum.map_join(fields, " ", fn {k, v} -> "#{k}=#{v}" end), fields} end)
    notify(job, {:unit, row})
  end

  @doc "A job begins."
  @spec started(Options.t()) :: :ok
  def started(options) do
    measurements = %{system_time: System.system_time()}
    Telemetry.execute([:viva_tensor, :job, :start], measurements, job(options))
  end

  @doc "A job has ended, after `duration`."
  @spec ended(Options.t(), Job.result(), integer) :: :ok
  def ended(options, {:error, error}, duration) do
    metadata = Map.put(job(options), :error, error)
    Telemetry.execute([:viva_tensor, :job, :exception], %{duration: duration}, metadata)
  end

  def ended(options, {_ok_or_partial, report}, duration) do
    measurements =
      report |> Map.take([:input_bytes, :output_bytes]) |> Map.put(:duration, duration)

    metadata = Map.put(job(options), :quarantined, length(report.quarantined))
    Telemetry.execute([:viva_tensor, :job, :stop], measurements, metadata)
  end

  @doc "An attempt failed. What a unit returned it has told itself; a dead worker cannot."
  @spec failed(Step.t(), term) :: :ok
  def failed(%{work: {:unit, unit, _id}} = step, reason) do
    if match?(%Error{}, reason) do
      :ok
    else
      metadata = Map.put(unit(step, unit), :crash, reason)
      Telemetry.execute([:viva_tensor, :unit, :exception], %{duration: 0}, metadata)
    end
  end

  def failed(_step, _reason), do: :ok

  @doc "Nodes joined the job, were lost to it, or refused."
  @spec nodes(job, [Members.event()]) :: :ok
  def nodes(job, told) do
    for event <- told do
      Logger.info(fn -> "#{event.node} #{event.state} #{event.reason}" end,
        to: job.options.to,
        node: event.node
      )

      notify(job, {:node, event})
    end

    :ok
  end

  @doc "A unit is put aside."
  @spec quarantined(job, map) :: :ok
  def quarantined(data, why) do
    metadata = Map.merge(%{job: self()}, why)
    Telemetry.execute([:viva_tensor, :unit, :quarantine], %{attempts: why.attempts}, metadata)
    notify(data, {:quarantined, why})
  end

  @doc "What events say of a unit of a job."
  @spec unit(Step.t(), Unit.t(), pid) :: map
  def unit(step, unit, job \\ self()) do
    %{job: job, name: unit.name, rows: unit.rows, action: unit.action, attempt: step.attempt}
  end

  defp job(options) do
    %{
      job: self(),
      source: options.source,
      to: options.to,
      format: Map.get(options.recipe, :format) || Map.get(options.recipe, :codes),
      layout: Map.get(options.recipe, :layout)
    }
  end
end
