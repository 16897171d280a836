defmodule VivaTensor.CLI.Convert do
  @moduledoc """
  The work behind `mix viva.convert`: flags to a job.
  """

  alias VivaTensor.CLI

  @task "viva.convert"

  @doc "Reads the flags: everything about them that needs no running application."
  @spec parse([String.t()]) :: {:ok, keyword} | :help | {:error, String.t()}
  def parse(argv) do
    with {:ok, flags} <- CLI.Job.parse(argv, layout: :string, dtype: :string) do
      if flags[:layout],
        do: {:ok, flags},
        else: {:error, "--layout is missing, for example --layout gguf"}
    end
  end

  @doc "Runs the job that the flags ask for. The application must be started."
  @spec run(keyword) :: CLI.exit_code()
  def run(flags) do
    {conversion, rest} = flags |> Keyword.split([:layout, :dtype])

    # The last of a repeated flag counts, as everywhere.
    options = [convert: List.last(Keyword.get_values(conversion, :layout))]
    dtype = List.last([nil | Keyword.get_values(conversion, :dtype)])
    CLI.Job.run(@task, rest ++ options ++ [dtype: dtype], flags)
  end
end
