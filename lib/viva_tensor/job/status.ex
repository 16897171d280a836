defmodule VivaTensor.Job.Status do
  @moduledoc """
  How far a job is, and how long the rest may take.
  """

  @typedoc """
  - `state` - `:planning`, `:scaling` (choosing the scales of columns), `:running`, `:finishing`, `:stopping` or `:done`
  - `bytes`, `bytes_done` - of the source's tensors
  - `bytes_written` - of the output's
  - `running` - names of the tensors being worked on
  - `eta_seconds` - `nil` until there is a rate to tell it from
  """
  @type t :: %{
          state: atom,
          tensors: non_neg_integer,
          tensors_done: non_neg_integer,
          bytes: non_neg_integer,
          bytes_done: non_neg_integer,
          bytes_written: non_neg_integer,
          running: [String.t()],
          seconds: float,
          bytes_per_second: float,
          eta_seconds: float | nil
        }

  @doc "The status of a job's state and data after `seconds`."
  @spec of(atom, map, float) :: t
  def of(state, data, seconds) do
    tally = data.tally
    rate = if seconds > 0, do: tally.bytes_done / seconds, else: 0.0

    %{
      state: state,
      tensors: tally.tensors,
      tensors_done: tally.tensors_done,
      bytes: tally.bytes,
      bytes_done: tally.bytes_done,
      bytes_written: tally.bytes_written,
      running: for({_, %{work: {:unit, unit, _}}} <- data.running, do: unit.name),
      seconds: seconds,
      bytes_per_second: rate,
      eta_seconds: if(rate > 0, do: (tally.bytes - tally.bytes_done) / rate)
    }
  end
end
