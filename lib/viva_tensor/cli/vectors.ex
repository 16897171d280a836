defmodule VivaTensor.CLI.Vectors do
  @moduledoc false
  # The work behind `mix viva.vectors`: flags to a job.

  alias VivaTensor.CLI

  @behaviour CLI

  @task "viva.vectors"

  @switches [
    codes: :string,
    rescore: :string,
    metric: :string,
    center: :boolean,
    queries: :integer,
    oversample: :integer,
    tensor: :string
  ]

  @values [codes: ~w(int8 int4 binary), rescore: ~w(f16 int8 none), metric: ~w(cosine dot)]

  # What other jobs take means nothing here.
  @impl CLI
  def switches, do: @switches |> CLI.Job.switches() |> Keyword.drop([:max_shard_size, :nodes])

  @doc """
  Reads the flags: everything about them that needs no running application.

      iex> VivaTensor.CLI.Vectors.parse(["a.npy", "--to", "out", "--codes", "bianry"])
      {:error, "--codes is int8, int4 or binary, not bianry; did you mean binary?"}
  """
  @impl CLI
  @spec parse([String.t()]) :: {:ok, keyword} | :help | {:error, String.t()}
  def parse(argv) do
    with {:ok, flags} <- CLI.Job.parse(argv, switches()),
         {:ok, flags} <- CLI.values(flags, @values) do
      if flags[:codes],
        do: {:ok, flags},
        else: {:error, "--codes is missing, for example --codes int8"}
    end
  end

  @doc "Runs the job that the flags ask for. The application must be started."
  @impl CLI
  @spec run(keyword) :: CLI.exit_code()
  def run(flags) do
    {source, options} = Keyword.pop!(flags, :source)
    # The last of a repeated flag counts, as everywhere.
    options = for {key, value} <- Map.new(options), do: {key, value}
    CLI.Job.run(@task, [vectors: source] ++ options, flags)
  end
end
