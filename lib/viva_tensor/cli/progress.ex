defmodule VivaTensor.CLI.Progress do
  @moduledoc false
  # How far a job is, on standard error: a bar that is drawn again and again on a
  # terminal, and elsewhere a plain line for each tenth of the way.

  alias VivaTensor.CLI.Style
  alias VivaTensor.Size

  @bar 24

  @enforce_keys [:terminal?]
  defstruct [:terminal?, tenth: 0]

  @typedoc "What is shown of a `t:VivaTensor.Job.Status.t/0`."
  @type shown :: %{
          required(:state) => atom,
          required(:tensors) => non_neg_integer,
          required(:tensors_done) => non_neg_integer,
          required(:bytes) => non_neg_integer,
          required(:bytes_done) => non_neg_integer,
          required(:bytes_per_second) => float,
          required(:eta_seconds) => float | nil,
          optional(any) => any
        }

  @type t :: %__MODULE__{terminal?: boolean, tenth: 0..10}

  @doc "A bar where standard error is a terminal."
  @spec new() :: t
  def new, do: %__MODULE__{terminal?: Style.terminal?(:stderr)}

  @doc "Shows a status."
  @spec show(t, shown) :: t
  def show(%__MODULE__{terminal?: true} = progress, status) do
    IO.write(:stderr, ["\r\e[K", bar(status), " ", line(status)])
    progress
  end

  def show(%__MODULE__{} = progress, status) do
    tenth = trunc(fraction(status) * 10)
    if tenth > progress.tenth, do: IO.puts(:stderr, line(status))
    %{progress | tenth: max(tenth, progress.tenth)}
  end

  @doc "Ends the display, so that what follows starts on a line of its own."
  @spec finish(t) :: :ok
  def finish(%__MODULE__{terminal?: true}), do: IO.write(:stderr, "\r\e[K")
  def finish(%__MODULE__{}), do: :ok

  @doc """
  A status in one line.

      iex> VivaTensor.CLI.Progress.line(%{
      ...>   state: :running, tensors_done: 3, tensors: 20, bytes_done: 500_000,
      ...>   bytes: 2_000_000, bytes_per_second: 2.5e8, eta_seconds: 75.0
      ...> })
      "3/20 tensors  500.0 kB of 2.00 MB  0.25 GB/s  ETA 1:15"
  """
  @spec line(shown) :: String.t()
  def line(%{state: :planning}), do: "reading the source"
  def line(%{state: :scaling}), do: "choosing the scales of columns"

  def line(%{vectors: %{done: done, of: of}} = status),
    do: line("#{done}#{if of, do: " of #{of}"} vectors", status)

  def line(status), do: line("#{status.tensors_done}/#{status.tensors} tensors", status)

  defp line(done, status) do
    # Of a stream nobody knows how long it is.
    all = if status.bytes > 0, do: " of #{Size.format(status.bytes)}", else: ""

    "#{done}  #{Size.format(status.bytes_done)}#{all}  " <>
      "#{:erlang.float_to_binary(status.bytes_per_second / 1.0e9, decimals: 2)} GB/s" <>
      phase(status)
  end

  defp phase(%{state: :running, eta_seconds: nil}), do: ""
  defp phase(%{state: :running, eta_seconds: seconds}), do: "  ETA #{clock(seconds)}"
  defp phase(%{state: :stopping}), do: "  stopping"
  defp phase(_status), do: "  syncing"

  defp clock(seconds) do
    seconds = ceil(seconds)
    hours = div(seconds, 3600)
    minutes = seconds |> rem(3600) |> div(60)
    rest = seconds |> rem(60) |> two_digits()
    if hours > 0, do: "#{hours}:#{two_digits(minutes)}:#{rest}", else: "#{minutes}:#{rest}"
  end

  defp two_digits(number), do: number |> Integer.to_string() |> String.pad_leading(2, "0")

  defp bar(status) do
    full = trunc(fraction(status) * @bar)
    ["[", String.duplicate("#", full), String.duplicate(".", @bar - full), "]"]
  end

  defp fraction(%{bytes: 0}), do: 0.0
  defp fraction(status), do: status.bytes_done / status.bytes
end
