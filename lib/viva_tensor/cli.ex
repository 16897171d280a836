defmodule VivaTensor.CLI do
  @moduledoc false
  # What the command line tools have in common: strict flags with a hint for a
  # misspelled one, `--help`, errors on standard error, and exit codes.
  #
  # The work behind a task is a module with this behaviour: `parse/1` reads everything about
  # the flags that needs no running application, `run/1` does what they ask for.
  #
  # | code | meaning |
  # |---|---|
  # | 0 | done |
  # | 1 | a tensor could not be done, for example one with NaN, and was put aside |
  # | 2 | wrong usage: an unknown flag, format or option |
  # | 3 | the source or the statistics cannot be read, or are not what they claim to be |
  # | 4 | the target exists or is unfinished, cannot be written, or the disk is full |
  # | 130 | cancelled |

  alias VivaTensor.CLI.Style
  alias VivaTensor.Error

  @type exit_code :: 0..255
  @type command :: term

  @callback switches() :: keyword
  @callback parse([String.t()]) :: {:ok, command} | :help | {:error, String.t()}
  @callback run(command) :: exit_code

  @doc "A Mix task: starts the application if the flags make sense, and exits with the code."
  @spec main(String.t(), module, [String.t()]) :: :ok
  def main(task, work, argv) do
    code =
      case work.parse(argv) do
        {:ok, command} ->
          Mix.Task.run("app.start")
          work.run(command)

        :help ->
          if Style.no_color?(), do: Application.put_env(:mix, :colors, enabled: false)
          Mix.Task.rerun("help", [task])
          0

        {:error, message} ->
          usage_error(task, message)
      end

    if code == 0, do: :ok, else: exit({:shutdown, code})
  end

  @doc """
  Reads `argv`. Flags outside `switches` are errors, not arguments.

      iex> VivaTensor.CLI.parse(["x", "--json"], json: :boolean)
      {:ok, [json: true], ["x"]}
      iex> VivaTensor.CLI.parse(["x", "--jsn"], json: :boolean)
      {:error, "unknown flag --jsn; did you mean --json?"}
      iex> VivaTensor.CLI.parse(["-h"], json: :boolean)
      :help
  """
  @spec parse([String.t()], keyword) ::
          {:ok, keyword, [String.t()]} | :help | {:error, String.t()}
  def parse(argv, switches) do
    switches = Keyword.put(switches, :help, :boolean)
    {opts, args, invalid} = OptionParser.parse(argv, strict: switches, aliases: [h: :help])

    cond do
      opts[:help] -> :help
      invalid == [] -> {:ok, opts, args}
      true -> {:error, invalid |> hd() |> invalid_flag(switches)}
    end
  end

  defp invalid_flag({flag, value}, switches) do
    known = for {key, _} <- switches, do: flag(key)

    cond do
      value != nil and flag in known -> "flag #{flag} cannot be #{inspect(value)}"
      flag in known -> "flag #{flag} needs a value"
      true -> "unknown flag #{flag}#{suggestion(flag, known)}"
    end
  end

  @doc """
  A switch as it is written.

      iex> VivaTensor.CLI.flag(:block_size)
      "--block-size"
  """
  @spec flag(atom) :: String.t()
  def flag(key), do: "--" <> (key |> to_string() |> String.replace("_", "-"))

  @doc """
  Checks flags whose values are among a few.

      iex> VivaTensor.CLI.values([codes: "int8"], codes: ~w(int8 int4 binary))
      {:ok, [codes: "int8"]}
      iex> VivaTensor.CLI.values([codes: "bianry"], codes: ~w(int8 int4 binary))
      {:error, "--codes is int8, int4 or binary, not bianry; did you mean binary?"}
  """
  @spec values(keyword, [{atom, [String.t()]}]) :: {:ok, keyword} | {:error, String.t()}
  def values(flags, known) do
    wrong =
      for {key, value} <- flags, names = known[key], value not in names, do: {key, value, names}

    case wrong do
      [] ->
        {:ok, flags}

      [{key, value, names} | _] ->
        {but, [last]} = Enum.split(names, -1)
        choice = "#{Enum.join(but, ", ")} or #{last}"
        {:error, "#{flag(key)} is #{choice}, not #{value}#{suggestion(value, names)}"}
    end
  end

  @doc """
  A hint to the most similar of `known`, if one is similar.

      iex> VivaTensor.CLI.suggestion("nf5", ["int8", "nf4"])
      "; did you mean nf4?"
      iex> VivaTensor.CLI.suggestion("gguf", ["int8", "nf4"])
      ""
  """
  @spec suggestion(String.t(), [String.t()]) :: String.t()
  def suggestion(word, known) do
    case Enum.max_by(known, &String.jaro_distance(word, &1), fn -> nil end) do
      nil -> ""
      best -> if String.jaro_distance(word, best) > 0.75, do: "; did you mean #{best}?", else: ""
    end
  end

  @doc """
  The usage error of a subcommand that is none of `known`.

      iex> VivaTensor.CLI.unknown_subcommand("lst", ["list", "report"])
      "no subcommand \\"lst\\"; did you mean list?"
      iex> VivaTensor.CLI.unknown_subcommand("stop", ["list", "report"])
      "no subcommand \\"stop\\"; there are list, report"
  """
  @spec unknown_subcommand(String.t(), [String.t()]) :: String.t()
  def unknown_subcommand(name, known) do
    hint =
      case suggestion(name, known) do
        "" -> "; there are #{Enum.join(known, ", ")}"
        suggestion -> suggestion
      end

    "no subcommand #{inspect(name)}#{hint}"
  end

  @doc "Prints a usage error and returns its exit code."
  @spec usage_error(String.t(), String.t()) :: exit_code
  def usage_error(task, message) do
    say(task, "#{message}\nmix help #{task} shows all flags.")
    2
  end

  @doc "Prints an error and returns its exit code. With `json: true` it goes to standard output too."
  @spec failure(String.t(), Error.t(), keyword) :: exit_code
  def failure(task, %Error{} = error, opts \\ []) do
    if opts[:json], do: IO.puts(json(%{error: error_map(error)}))
    say(task, error.message <> hint(error))
    exit_code(error)
  end

  @doc "What a task has to say to a person, on standard error."
  @spec say(String.t(), String.t()) :: :ok
  def say(task, message) do
    hint = ~r/did you mean [^?]+\?/
    message = Regex.replace(hint, message, &Style.paint(&1, :hint, :stderr))
    IO.puts(:stderr, "#{Style.paint(task <> ":", :bad, :stderr)} #{message}")
  end

  @doc "Pretty JSON of plain data."
  @spec json(term) :: String.t()
  def json(term) do
    {:ok, json} = VivaTensor.Native.json_encode(term, true)
    json
  end

  @doc "The exit code of an error."
  @spec exit_code(Error.t()) :: exit_code
  def exit_code(%Error{op: op, reason: reason}) do
    case {op, reason} do
      {_, {:cancelled, _}} -> 130
      {:output, _} -> 4
      {kind, _} when kind in [:source, :statistics, :open, :load] -> 3
      {kind, _} when kind in [:recipe, :conversion] -> 2
      {_, {:invalid_option, _}} -> 2
      {:compare, {:unknown_tensor, _}} -> 2
      {:unit, {:invalid_file, _}} -> 3
      {:unit, {:io, _}} -> 4
      _ -> 1
    end
  end

  defp error_map(%Error{op: op, reason: {kind, details}} = error) do
    %{op: op, kind: kind, details: details, message: error.message}
  end

  defp hint(%Error{reason: {kind, %{name: name, known: known}}})
       when kind in [:unknown_format, :unknown_layout, :unknown_recipe] do
    suggestion(to_string(name), known |> to_string() |> String.split(", "))
  end

  defp hint(%Error{reason: {:non_finite, _}}), do: " (--non-finite keep)"
  defp hint(_error), do: ""
end
