defmodule VivaTensor.Job.Failure do
  @moduledoc false
  # What is said of a step that failed.

  alias VivaTensor.Error
  alias VivaTensor.Job.Unit

  @typedoc "An error that was returned, too long a time, or what a worker died of."
  @type reason :: Error.t() | {:timeout, pos_integer} | term

  @doc "Why an attempt failed, for people."
  @spec text(reason) :: String.t()
  def text(%Error{message: message}), do: message
  def text({:timeout, milliseconds}), do: "it took longer than #{milliseconds} ms"
  def text(reason), do: "its worker died: #{inspect(reason)}"

  @doc "The error of work that no attempt is left for."
  @spec final(String.t(), pos_integer, reason) :: Error.t()
  def final(_work, _attempts, %Error{} = error), do: error

  def final(work, attempts, reason) do
    reason = text(reason)
    details = %{work: work, attempts: attempts, reason: reason}
    Error.new(:job, {:worker_crashed, details}, "#{work}: failed #{attempts} times; #{reason}")
  end

  @doc "An error of a unit, with the name of its tensor."
  @spec about(Error.t(), Unit.t()) :: Error.t()
  def about(%Error{reason: {kind, details}} = error, unit) do
    details = Map.put(details, :tensor, unit.name)
    Error.new(error.op, {kind, details}, "#{unit.name}: #{error.message}")
  end

  @doc "What a weight holds that is not finite."
  @spec non_finite(%{:nan => non_neg_integer, :inf => non_neg_integer, optional(any) => any}) ::
          String.t()
  def non_finite(%{nan: nan, inf: inf}), do: "#{nan} NaN and #{inf} infinite values"
end
