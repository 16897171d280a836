defmodule VivaTensor.Job.Status do
  @moduledoc """
  How far a job is, and how long the rest may take.
  """

  alias VivaTensor.Job.{Admission, Step, Unit}

  @typedoc """
  - `state` - `:planning`, `:scaling` (choosing the scales of columns), `:running`, `:finishing`, `:stopping` or `:done`
  - `bytes`, `bytes_done` - of the source's tensors
  - `bytes_written` - of the output's
  - `running` - names of the tensors being worked on
  - `units` - the same with how long it takes already, which attempt it is, and on which
    node, if on another
  - `nodes` - other nodes that have joined, and how many units each does at once
  - `quarantined` - tensors that were put aside
  - `memory` - bytes in flight over all jobs, as admission counts them, and what the native
    side holds
  - `eta_seconds` - `nil` until there is a rate to tell it from, and for a stream
  - `vectors` - of a job that compresses them; a stream's job knows of no end
  """
  @type t :: %{
          optional(:vectors) => %{done: non_neg_integer, of: non_neg_integer | nil},
          state: atom,
          tensors: non_neg_integer,
          tensors_done: non_neg_integer,
          bytes: non_neg_integer,
          bytes_done: non_neg_integer,
          bytes_written: non_neg_integer,
          running: [String.t()],
          units: [
            %{name: String.t(), seconds: float, attempt: pos_integer, node: node | nil}
          ],
          nodes: %{node => pos_integer},
          quarantined: non_neg_integer,
          memory: %{in_flight: non_neg_integer, limit: pos_integer, native: non_neg_integer},
          seconds: float,
          bytes_per_second: float,
          eta_seconds: float | nil
        }

  # Of a job's state and data after `seconds`.
  @doc false
  @spec of(atom, map, float) :: t
  def of(state, data, seconds) do
    tally = data.tally
    now = System.monotonic_time()

    units =
      for {_ref, step} <- data.running, unit <- Step.units(step) do
        microseconds = System.convert_time_unit(now - step.started, :native, :microsecond)
        seconds = microseconds / 1.0e6
        %{name: Unit.label(unit), seconds: seconds, attempt: step.attempt, node: step.node}
      end

    rate = if seconds > 0, do: tally.bytes_done / seconds, else: 0.0

    %{
      state: state,
      tensors: tally.tensors,
      tensors_done: tally.tensors_done,
      bytes: tally.bytes,
      bytes_done: tally.bytes_done,
      bytes_written: tally.bytes_written,
      running: Enum.map(units, & &1.name),
      units: units,
      nodes: Map.new(data.members.joined, fn {node, member} -> {node, member.workers} end),
      quarantined: map_size(tally.quarantined),
      memory: %{
        in_flight: Admission.in_flight(),
        limit: data.options.memory_limit,
        native: VivaTensor.memory_info().native_bytes
      },
      seconds: seconds,
      bytes_per_second: rate,
      eta_seconds: if(rate > 0, do: (tally.bytes - tally.bytes_done) / rate)
    }
  end
end
