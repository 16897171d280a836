defmodule VivaTensor.Job.Step do
  @moduledoc false
  # One thing that a worker of a job does: make the plan, read what an earlier job
  # recorded, choose the scales of a group of weights, do a unit or look whether it is
  # done already, finish a shard.
  #
  # Very small units that keep their tensors are done one after another by one worker, since
  # handing each of them out would take longer than doing it. What fails there is done again
  # alone.
  #
  # Its cancel flag is its own and made anew for each attempt, so that one that takes
  # too long can be asked to leave without any other. A step that was sent to another
  # `node` has its flag there, with the member that it is `away` with.

  alias VivaTensor.Job.{Manifest, Observation, Resumption, Shard, Span}
  alias VivaTensor.Job.{Unit, Workers}
  alias VivaTensor.{Error, Native}

  # Together no more than what a killed job may have to do again for each worker.
  @very_small_bytes 4 * 1024
  @together 64

  @enforce_keys [:work, :bytes]
  defstruct [
    :work,
    :bytes,
    :ticket,
    :cancel,
    :node,
    :away,
    :pid,
    :timer,
    :slot,
    :started,
    :ended,
    attempt: 1,
    overdue: false
  ]

  @type work ::
          :plan
          | {:compare, {:unfinished | :published, Path.t()}}
          | {:search, Observation.group()}
          | {:unit, Unit.t(), Manifest.shard()}
          | {:units, [Unit.t()], Manifest.shard()}
          | {:recall, Unit.t(), Manifest.shard(), Resumption.unit()}
          | {:finish, Manifest.shard()}

  @type t :: %__MODULE__{
          work: work,
          bytes: non_neg_integer,
          ticket: reference | nil,
          cancel: reference | nil,
          node: node | nil,
          away: {pid, reference} | nil,
          pid: pid | nil,
          timer: reference | nil,
          slot: non_neg_integer | nil,
          started: integer | nil,
          ended: integer | nil,
          attempt: pos_integer,
          overdue: boolean
        }

  @doc "A step that may take so much memory."
  @spec new(work, non_neg_integer) :: t
  def new(work, bytes \\ 0), do: %__MODULE__{work: work, bytes: bytes}

  @doc "The step that does a unit of a shard."
  @spec unit(Unit.t(), Manifest.shard()) :: t
  def unit(unit, id), do: new({:unit, unit, id}, Unit.bytes(unit))

  @doc "The steps that do a tensor of a shard."
  @spec tensor(Unit.t(), Manifest.shard()) :: [t]
  def tensor(unit, id), do: unit |> Unit.ranges() |> Enum.map(&unit(&1, id))

  @doc "The steps of a shard, of which an earlier job recorded some units."
  @spec all(Shard.t(), %{{Manifest.shard(), String.t()} => Resumption.unit()}) :: [t]
  def all(%Shard{units: []} = shard, _recorded), do: [new({:finish, shard.id})]

  def all(%Shard{} = shard, recorded) do
    shard.units
    |> Enum.flat_map(fn unit ->
      case Map.fetch(recorded, {shard.id, unit.name}) do
        {:ok, {:rows, parts}} -> unit |> tensor(shard.id) |> Enum.map(&recalled(&1, parts))
        {:ok, unit_then} -> [new({:recall, unit, shard.id, unit_then})]
        :error -> tensor(unit, shard.id)
      end
    end)
    |> Enum.chunk_by(&very_small?/1)
    |> Enum.flat_map(fn [first | _] = steps ->
      if very_small?(first),
        do: steps |> Enum.chunk_every(@together) |> Enum.map(&together/1),
        else: steps
    end)
  end

  defp recalled(%{work: {:unit, unit, id}} = step, parts) do
    case Map.fetch(parts, unit.rows) do
      {:ok, part} -> new({:recall, unit, id, {:rows, part}})
      :error -> step
    end
  end

  defp very_small?(%{work: {:unit, %{action: :keep} = unit, _}}),
    do: unit.input_bytes <= @very_small_bytes

  defp very_small?(_step), do: false

  defp together([step]), do: step

  defp together([%{work: {:unit, _, id}} | _] = steps) do
    new({:units, for(%{work: {_, unit, _}} <- steps, do: unit), id}, sum(steps, :bytes))
  end

  @doc "The steps that do the units of such a step one by one."
  @spec apart(t) :: [t]
  def apart(%{work: {:units, units, id}}), do: Enum.map(units, &unit(&1, id))

  @doc "The step with a cancel flag for its next attempt."
  @spec armed(t) :: t
  def armed(step), do: %{step | cancel: Native.cancel_flag(), overdue: false}

  @doc """
  Begins a step in a worker of its own, in the first slot that no `running` step has: what
  the worker's messages are known by, and the step. After `timeout` milliseconds comes
  `{:overdue, ref}`, if time is limited for it.
  """
  @spec begin(t, (() -> term), timeout, %{reference => t}) :: {reference, t}
  def begin(step, fun, timeout, running) do
    task = Task.Supervisor.async_nolink(Workers, fun)
    {task.ref, step |> in_slot(running) |> began(task.pid, task.ref, timeout)}
  end

  @doc "The step, sent to a member on another node, where it will begin."
  @spec away(t, node, {pid, reference}, %{reference => t}) :: t
  def away(step, node, away, running) do
    %{step | node: node, away: away, overdue: false} |> in_slot(running) |> started()
  end

  @doc "The step, begun by a worker; what comes after `timeout` has this `ref`."
  @spec began(t, pid, reference, timeout) :: t
  def began(step, pid, ref, timeout) do
    timer =
      if timed?(step) and timeout != :infinity,
        do: Process.send_after(self(), {:overdue, ref}, timeout)

    started(%{step | pid: pid, timer: timer})
  end

  defp started(step), do: %{step | started: System.monotonic_time()}

  defp in_slot(step, running) do
    there = for {_ref, other} <- running, other.node == step.node, do: other
    %{step | slot: Span.free_slot(there)}
  end

  @doc "Asks the native call of a running step to leave."
  @spec cancel(t) :: :ok
  def cancel(%{away: {member, ref}}) do
    send(member, {:cancel, ref})
    :ok
  end

  def cancel(%{cancel: flag}), do: Native.cancel(flag)

  @doc """
  Kills the worker of a running step. Of one that is away the answer is not waited for:
  its node may be the reason.
  """
  @spec kill(t) :: :ok
  def kill(%{away: {_member, ref}, pid: pid}) do
    if pid, do: Process.exit(pid, :kill)
    send(self(), {:DOWN, ref, :process, pid, :killed})
    :ok
  end

  def kill(%{pid: pid}) do
    Process.exit(pid, :kill)
    :ok
  end

  @doc "What is left of a step when its worker has returned."
  @spec ended(t) :: t
  def ended(step) do
    if step.timer, do: Process.cancel_timer(step.timer)
    %{step | ticket: nil, away: nil, pid: nil, timer: nil, ended: System.monotonic_time()}
  end

  @doc """
  Why a step has no result that counts: its worker died, or it took longer than `timeout`
  and left when it was told to.
  """
  @spec failure(t, {:died, term} | {:ok, term} | {:error, Error.t()}, timeout) ::
          {:failed, term} | nil
  def failure(%{overdue: true}, {:died, _reason}, timeout), do: {:failed, {:timeout, timeout}}

  def failure(%{overdue: true}, {:error, %{reason: {:cancelled, _}}}, timeout),
    do: {:failed, {:timeout, timeout}}

  def failure(_step, {:died, reason}, _timeout), do: {:failed, reason}
  def failure(_step, _result, _timeout), do: nil

  @doc "The step, to be tried once more."
  @spec again(t) :: t
  def again(step), do: %{step | attempt: step.attempt + 1, node: nil}

  defp timed?(%{work: {:unit, _, _}}), do: true
  defp timed?(%{work: {:units, _, _}}), do: true
  defp timed?(%{work: {:search, _}}), do: true
  defp timed?(_step), do: false

  @doc "Bytes of the source that are to be done again if these steps are lost."
  @spec at_stake([t]) :: non_neg_integer
  def at_stake(steps), do: steps |> Enum.flat_map(&units/1) |> sum(:input_bytes)

  @doc "The units that a step does."
  @spec units(t) :: [Unit.t()]
  def units(%{work: {:unit, unit, _}}), do: [unit]
  def units(%{work: {:units, units, _}}), do: units
  def units(_step), do: []

  defp sum(all, key), do: all |> Enum.map(&Map.fetch!(&1, key)) |> Enum.sum()

  @doc "What a step is about."
  @spec name(t) :: String.t()
  def name(%{work: :plan}), do: "the plan"
  def name(%{work: {:compare, {_what, manifest}}}), do: manifest
  def name(%{work: {:search, {into, _, _}}}), do: "the scales of #{into}"
  def name(%{work: {:finish, id}}), do: "shard #{Enum.join(id, "-")}"
  def name(%{work: {:unit, unit, _}}), do: Unit.label(unit)
  def name(%{work: {:units, [unit | more], _}}), do: "#{unit.name} and #{length(more)} more"
  def name(%{work: {:recall, unit, _, _}}), do: Unit.label(unit)
end
