defmodule VivaTensor.CLI.Vectors do
  @moduledoc """
  The work behind `mix viva.vectors`: flags to a job.
  """

  alias VivaTensor.CLI

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
  @others [max_shard_size: "--max-shard-size", nodes: "--nodes"]

  @doc """
  Reads the flags: everything about them that needs no running application.

      iex> VivaTensor.CLI.Vectors.parse(["a.npy", "--to", "out", "--codes", "bianry"])
      {:error, "--codes is int8, int4 or binary, not bianry; did you mean binary?"}
  """
  @spec parse([String.t()]) :: {:ok, keyword} | :help | {:error, String.t()}
  def parse(argv) do
    with {:ok, flags} <- CLI.Job.parse(argv, @switches), do: check(flags)
  end

  defp check(flags) do
    wrong = for {key, known} <- @values, value = flags[key], value not in known, do: {key, value}
    other = Enum.find(@others, fn {key, _} -> Keyword.has_key?(flags, key) end)

    case {wrong, other} do
      {[{key, value} | _], _} ->
        known = @values[key]
        {but, [last]} = Enum.split(known, -1)
        choice = "#{Enum.join(but, ", ")} or #{last}"
        {:error, "--#{key} is #{choice}, not #{value}#{CLI.suggestion(value, known)}"}

      {[], {_key, flag}} ->
        {:error, "unknown flag #{flag}"}

      {[], nil} ->
        if flags[:codes],
          do: {:ok, flags},
          else: {:error, "--codes is missing, for example --codes int8"}
    end
  end

  @doc "Runs the job that the flags ask for. The application must be started."
  @spec run(keyword) :: CLI.exit_code()
  def run(flags) do
    {source, options} = Keyword.pop!(flags, :source)
    # The last of a repeated flag counts, as everywhere.
    options = for {key, value} <- Map.new(options), do: {key, value}
    CLI.Job.run(@task, [vectors: source] ++ options, flags)
  end
end
