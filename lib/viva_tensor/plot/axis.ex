defmodule VivaTensor.Plot.Axis do
  @moduledoc false
  # Axes of plots: what range of values they have, where their ticks are, and how its
  # numbers are written.

  @enforce_keys [:scale, :low, :high, :ticks]
  defstruct [:scale, :low, :high, :ticks]

  @typedoc "`low` and `high` are on the scale: logarithms where it is logarithmic."
  @type t :: %__MODULE__{
          scale: (number -> float),
          low: float,
          high: float,
          ticks: [float]
        }

  @doc """
  An axis with all of these values on it, and a margin of a part of their span on
  both sides. Options: `log: false`, `margin: 0.07`.

      iex> axis = VivaTensor.Plot.Axis.new([0, 10])
      iex> {Float.round(axis.low, 2), axis.ticks}
      {-0.7, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]}
  """
  @spec new([number], keyword) :: t
  def new(values, options \\ [])
  def new([], options), do: new([1], options)

  def new(values, options) do
    log? = Keyword.get(options, :log, false)
    margin = Keyword.get(options, :margin, 0.07)
    {least, most} = Enum.min_max(values)
    scale = if log?, do: &:math.log/1, else: &(&1 / 1)
    span = max(scale.(most) - scale.(least), if(log?, do: 0.2, else: 1.0e-9 + abs(most) / 10))
    low = scale.(least) - span * margin
    high = scale.(most) + span * margin
    back = if log?, do: &:math.exp/1, else: & &1
    ticks = ticks(back.(low), back.(high), log?)
    %__MODULE__{scale: scale, low: low, high: high, ticks: ticks}
  end

  @doc """
  How far a value is from the low end of an axis to the high one, of 1.

      iex> axis = VivaTensor.Plot.Axis.new([0, 10])
      iex> Float.round(VivaTensor.Plot.Axis.part(axis, 5), 2)
      0.5
  """
  @spec part(t, number) :: float
  def part(axis, value), do: (axis.scale.(value) - axis.low) / (axis.high - axis.low)

  defp ticks(low, high, false), do: even_ticks(low, high)

  defp ticks(low, high, true) do
    [[1, 2, 5], Enum.to_list(1..9)]
    |> Enum.map(fn digits ->
      for power <- floor(:math.log10(low))..ceil(:math.log10(high)),
          digit <- digits,
          tick = digit * :math.pow(10, power),
          tick >= low and tick <= high,
          do: tick
    end)
    |> Enum.find(even_ticks(low, high), &(length(&1) >= 4))
  end

  # Multiples of 1, 2 or 5 times a power of ten, some six of them.
  defp even_ticks(low, high) do
    raw = (high - low) / 6
    power = :math.pow(10, floor(:math.log10(raw)))
    step = power * Enum.find([1, 2, 5, 10], &(&1 * power >= raw))
    for n <- ceil(low / step)..floor(high / step)//1, do: n * step
  end

  @doc """
  A number in four digits, without the zeros that say nothing.

      iex> for n <- [0, 4.5, 20.123456, 0.1 + 0.2, 123456], do: VivaTensor.Plot.Axis.number(n)
      ["0", "4.5", "20.12", "0.3", "123456"]
  """
  @spec number(number) :: String.t()
  def number(value) when value == 0, do: "0"

  def number(value) do
    digits = max(0, 3 - floor(:math.log10(abs(value))))
    text = :erlang.float_to_binary(value / 1, decimals: min(digits, 12))
    if text =~ ".", do: text |> String.trim_trailing("0") |> String.trim_trailing("."), else: text
  end
end
