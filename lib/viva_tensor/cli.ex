defmodule VivaTensor.CLI do
  @moduledoc """
  What the command line tools have in common: strict flags with a hint for a
  misspelled one, errors on standard error, and exit codes.

  | code | meaning |
  |---|---|
  | 0 | done |
  | 1 | a tensor could not be done, for example one with NaN, and was put aside |
  | 2 | wrong usage: an unknown flag, format or option |
  | 3 | the source or the statistics cannot be read, or are not what they claim to be |
  | 4 | the target exists or is unfinished, cannot be written, or the disk is full |
  | 130 | cancelled |
  """

  alias VivaTensor.Error

  @type exit_code :: 0..255

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

  defp flag(key), do: "--" <> (key |> to_string() |> String.replace("_", "-"))

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

  @doc "Prints a usage error and returns its exit code."
  @spec usage_error(String.t(), String.t()) :: exit_code
  def usage_error(task, message) do
    IO.puts(:stderr, "#{task}: #{message}\nmix help #{task} shows all flags.")
    2
  end

  @doc "Prints an error and returns its exit code. With `json: true` it goes to standard output too."
  @spec failure(String.t(), Error.t(), keyword) :: exit_code
  def failure(task, %Error{} = error, opts \\ []) do
    if opts[:json], do: IO.puts(json(%{error: error_map(error)}))
    IO.puts(:stderr, "#{task}: #{error.message}#{hint(error)}")
    exit_code(error)
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
