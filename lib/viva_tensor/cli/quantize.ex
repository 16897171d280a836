defmodule VivaTensor.CLI.Quantize do
  @moduledoc false
  # The work behind `mix viva.quantize`: flags to a job.

  alias VivaTensor.{Calibration, CLI}

  @behaviour CLI

  @task "viva.quantize"

  @switches [
    recipe: :string,
    format: :string,
    method: :string,
    scales: :string,
    statistics: :string,
    damping: :float,
    order: :string,
    sparsity: :string,
    duo_scaling: :string,
    clip: :boolean,
    act_order: :boolean,
    symmetric: :boolean,
    block_size: :integer,
    double_quant: :boolean,
    values: :string,
    layout: :string,
    include: [:string, :keep],
    exclude: [:string, :keep],
    non_finite: :string
  ]

  # Options whose values the library takes as atoms.
  @names [:recipe, :format, :method, :scales, :order, :sparsity, :duo_scaling, :values] ++
           [:layout, :non_finite]

  # Those that are the same for every format.
  @values [
    method: ~w(rtn mse hqq) ++ Enum.map(Calibration.methods(), &to_string/1),
    scales: ~w(rtn mse),
    order: ~w(natural activation),
    sparsity: ~w(magnitude wanda sparsegpt),
    duo_scaling: ~w(false true both),
    values: ~w(source f32 f16 bf16 int8 fp8_e4m3),
    non_finite: ~w(error keep)
  ]

  @impl CLI
  def switches, do: CLI.Job.switches(@switches)

  @doc "Reads the flags: everything about them that needs no running application."
  @impl CLI
  @spec parse([String.t()]) :: {:ok, keyword} | :help | {:error, String.t()}
  def parse(argv) do
    with {:ok, flags} <- CLI.Job.parse(argv, switches()),
         {:ok, flags} <- CLI.values(flags, @values) do
      if flags[:format] || flags[:recipe],
        do: {:ok, flags},
        else: {:error, "--format is missing, for example --format nf4, or --recipe nf4"}
    end
  end

  @doc "Runs the job that the flags ask for. The application must be started."
  @impl CLI
  @spec run(keyword) :: CLI.exit_code()
  def run(flags), do: CLI.Job.run(@task, job_options(flags), flags)

  defp job_options(flags) do
    options =
      flags
      |> Keyword.drop([:include, :exclude])
      |> Enum.map(fn
        {key, value} when key in @names -> {key, String.to_atom(value)}
        option -> option
      end)

    options ++ for key <- [:include, :exclude], do: {key, Keyword.get_values(flags, key)}
  end
end
