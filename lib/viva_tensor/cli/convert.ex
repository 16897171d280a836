defmodule VivaTensor.CLI.Convert do
  @moduledoc false
  # The work behind `mix viva.convert`: flags to a job.

  alias VivaTensor.CLI

  @behaviour CLI

  @task "viva.convert"
  @switches [layout: :string, dtype: :string]

  @impl CLI
  def switches, do: CLI.Job.switches(@switches)

  @doc "Reads the flags: everything about them that needs no running application."
  @impl CLI
  @spec parse([String.t()]) :: {:ok, keyword} | :help | {:error, String.t()}
  def parse(argv) do
    with {:ok, flags} <- CLI.Job.parse(argv, switches()),
         {:ok, flags} <- CLI.values(flags, dtype: ~w(f32 f16 bf16)) do
      if flags[:layout],
        do: {:ok, flags},
        else: {:error, "--layout is missing, for example --layout gguf"}
    end
  end

  @doc "Runs the job that the flags ask for. The application must be started."
  @impl CLI
  @spec run(keyword) :: CLI.exit_code()
  def run(flags) do
    {conversion, rest} = flags |> Keyword.split([:layout, :dtype])

    # The last of a repeated flag counts, as everywhere.
    options = [convert: List.last(Keyword.get_values(conversion, :layout))]
    dtype = List.last([nil | Keyword.get_values(conversion, :dtype)])
    CLI.Job.run(@task, rest ++ options ++ [dtype: dtype], flags)
  end
end
