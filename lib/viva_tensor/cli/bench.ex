defmodule VivaTensor.CLI.Bench do
  @moduledoc """
  The work behind `mix viva.bench`: which measurement, with which flags.
  """

  alias VivaTensor.CLI

  @subcommands %{"quality" => CLI.Quality}
  @names @subcommands |> Map.keys() |> Enum.sort() |> Enum.join(", ")

  @doc """
  Reads the subcommand and its flags.

      iex> VivaTensor.CLI.Bench.parse(["quality", "--json"])
      {:ok, {"quality", [json: true]}}
      iex> VivaTensor.CLI.Bench.parse(["qualty"])
      {:error, "no subcommand \\"qualty\\"; did you mean quality?"}
  """
  @spec parse([String.t()]) :: {:ok, {String.t(), keyword}} | :help | {:error, String.t()}
  def parse(argv) do
    case CLI.parse(argv, json: :boolean) do
      {:ok, flags, [name]} when is_map_key(@subcommands, name) -> {:ok, {name, flags}}
      {:ok, _flags, []} -> {:error, "which subcommand? There is #{@names}"}
      {:ok, _flags, [name]} -> {:error, "no subcommand #{inspect(name)}#{hint(name)}"}
      {:ok, _flags, [_, extra | _]} -> {:error, "what is #{inspect(extra)}?"}
      other -> other
    end
  end

  defp hint(name) do
    case CLI.suggestion(name, Map.keys(@subcommands)) do
      "" -> "; there is #{@names}"
      suggestion -> suggestion
    end
  end

  @doc "Runs a subcommand. The application must be started."
  @spec run({String.t(), keyword}) :: CLI.exit_code()
  def run({name, flags}), do: Map.fetch!(@subcommands, name).run(flags)
end
