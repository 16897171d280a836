defmodule VivaTensor.CLI.Bench do
  @moduledoc false
  # The work behind `mix viva.bench`: which measurement, with which flags.

  alias VivaTensor.CLI

  @behaviour CLI

  # Each with the flags that it takes besides --json.
  @subcommands %{
    "quality" => {CLI.Quality, []},
    "ops" => {CLI.Ops, []},
    "peers" => {CLI.Peers, venv: :string, rows: :string, repeats: :integer, threads: :integer}
  }
  @names @subcommands |> Map.keys() |> Enum.sort()
  @switches for {_, {_, switches}} <- @subcommands, switch <- switches, do: switch

  @impl CLI
  def switches, do: [json: :boolean] ++ @switches

  @doc """
  Reads the subcommand and its flags.

      iex> VivaTensor.CLI.Bench.parse(["quality", "--json"])
      {:ok, {"quality", [json: true]}}
      iex> VivaTensor.CLI.Bench.parse(["qualty"])
      {:error, "no subcommand \\"qualty\\"; did you mean quality?"}
      iex> VivaTensor.CLI.Bench.parse(["ops", "--venv", "somewhere"])
      {:error, "ops takes no --venv"}
  """
  @impl CLI
  @spec parse([String.t()]) :: {:ok, {String.t(), keyword}} | :help | {:error, String.t()}
  def parse(argv) do
    case CLI.parse(argv, switches()) do
      {:ok, flags, [name]} when is_map_key(@subcommands, name) -> check(name, flags)
      {:ok, _flags, []} -> {:error, "which subcommand? There are #{Enum.join(@names, ", ")}"}
      {:ok, _flags, [name]} -> {:error, CLI.unknown_subcommand(name, @names)}
      {:ok, _flags, [_, extra | _]} -> {:error, "what is #{inspect(extra)}?"}
      other -> other
    end
  end

  defp check(name, flags) do
    {_, switches} = @subcommands[name]

    case Keyword.drop(flags, [:json | Keyword.keys(switches)]) do
      [] -> {:ok, {name, flags}}
      [{other, _} | _] -> {:error, "#{name} takes no #{CLI.flag(other)}"}
    end
  end

  @doc "Runs a subcommand. The application must be started."
  @impl CLI
  @spec run({String.t(), keyword}) :: CLI.exit_code()
  def run({name, flags}) do
    {module, _} = Map.fetch!(@subcommands, name)
    module.run(flags)
  end
end
