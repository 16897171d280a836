defmodule VivaTensor.Job.Span do
  @moduledoc false
  # When a unit was done, and by which worker: its bar in the time line of the job.
  #
  # Times are seconds since the job began. Those of an earlier job mean nothing to the one
  # that goes on with it, so a unit that was done then has the times of being looked at now,
  # and is marked as `verified`.

  alias VivaTensor.Job.Step
  alias VivaTensor.Report

  @doc """
  The smallest number of a worker that none of these steps has.

      iex> VivaTensor.Job.Span.free_slot([%{slot: 0}, %{slot: 2}])
      1
  """
  @spec free_slot([%{slot: non_neg_integer}]) :: non_neg_integer
  def free_slot(running) do
    taken = MapSet.new(running, & &1.slot)
    0 |> Stream.iterate(&(&1 + 1)) |> Enum.find(&(&1 not in taken))
  end

  @type t :: %{
          worker: non_neg_integer,
          began: float,
          ended: float,
          attempt: pos_integer,
          verified: boolean,
          node: node | nil
        }

  @doc "The span of a step that did or verified a unit, in a job that began then."
  @spec of(Step.t(), integer) :: t
  def of(step, job_began) do
    %{
      worker: step.slot,
      began: seconds(step.started - job_began),
      ended: seconds(step.ended - job_began),
      attempt: step.attempt,
      verified: match?({:recall, _, _, _}, step.work),
      node: step.node
    }
  end

  @doc "The row of a unit with its span; the job's own node is not named."
  @spec put(Report.row(), t) :: Report.row()
  def put(row, %{node: nil} = span), do: row |> Map.merge(span) |> Map.delete(:node)
  def put(row, span), do: Map.merge(row, span)

  defp seconds(native), do: System.convert_time_unit(native, :native, :microsecond) / 1.0e6
end
