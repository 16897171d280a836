defmodule VivaTensor.CLI.Style do
  @moduledoc false
  # Colours, for a person who looks at a terminal: there are none in pipes and files, and
  # none anywhere with `NO_COLOR` set (https://no-color.org).

  alias VivaTensor.Table

  @codes [title: :bright, good: :green, bad: :red, hint: :cyan]

  @type style :: :title | :good | :bad | :hint
  @type device :: :stdio | :stderr

  @doc """
  Text in a style, where what it is for may have colours.

      iex> VivaTensor.CLI.Style.paint("fits", :good, true)
      "\\e[32mfits\\e[0m"
      iex> VivaTensor.CLI.Style.paint("fits", :good, false)
      "fits"
  """
  @spec paint(String.t(), style, device | boolean) :: String.t()
  def paint(text, style, where \\ :stdio)
  def paint("", _style, _where), do: ""
  def paint(text, _style, false), do: text

  def paint(text, style, true) do
    IO.ANSI.format_fragment([@codes[style], text, :reset], true) |> IO.iodata_to_binary()
  end

  def paint(text, style, device), do: paint(text, style, colours?(device))

  @doc "A table for standard output, its titles in their style."
  @spec table([Table.column()], [[term]]) :: iodata
  def table(columns, rows) do
    [[titles, newline] | rows] = Table.text(columns, rows)
    [paint(titles, :title), newline | rows]
  end

  @doc "Whether what is written to a device may have colours."
  @spec colours?(device) :: boolean
  def colours?(device), do: terminal?(device) and not no_color?()

  @doc "Whether the user asked for no colours."
  @spec no_color?() :: boolean
  def no_color?, do: System.get_env("NO_COLOR") not in [nil, ""]

  @doc "Whether a device is a terminal that understands ANSI sequences."
  @spec terminal?(device) :: boolean
  def terminal?(:stdio), do: IO.ANSI.enabled?()

  # What Elixir allows is up to standard output alone on Erlang/OTP 26 and later, which
  # can tell, and before that up to both.
  def terminal?(:stderr) do
    told? = Code.ensure_loaded?(:prim_tty) and function_exported?(:prim_tty, :isatty, 1)
    IO.ANSI.enabled?() and (not told? or apply(:prim_tty, :isatty, [:stderr]) == true)
  end
end
