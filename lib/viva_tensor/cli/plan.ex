defmodule VivaTensor.CLI.Plan do
  @moduledoc """
  The work behind `mix viva.plan`: what a model takes in each format, and what fits.
  """

  alias VivaTensor.{CLI, Plan, Size, Table}

  @task "viva.plan"
  @switches [budget: :string, vram: :string, context: :integer, batch: :integer, json: :boolean]

  @doc """
  Reads the flags.

      iex> VivaTensor.CLI.Plan.parse(["llama-7b", "--vram", "24GB"])
      {:ok, [model: "llama-7b", budget: "24GB"]}
  """
  @spec parse([String.t()]) :: {:ok, keyword} | :help | {:error, String.t()}
  def parse(argv) do
    case CLI.parse(argv, @switches) do
      {:ok, flags, [model]} -> {:ok, [model: model] ++ for({k, v} <- flags, do: {key(k), v})}
      {:ok, _flags, []} -> {:error, "which MODEL?"}
      {:ok, _flags, [_, extra | _]} -> {:error, "one MODEL at a time; what is #{inspect(extra)}?"}
      other -> other
    end
  end

  defp key(:vram), do: :budget
  defp key(key), do: key

  @doc "Prints the estimate. The application must be started."
  @spec run(keyword) :: CLI.exit_code()
  def run(flags) do
    {[model: model], options} = Keyword.split(flags, [:model])
    {json, options} = Keyword.pop(options, :json, false)

    case Plan.estimate(model, options) do
      {:ok, plan} when json -> IO.puts(CLI.json(Map.from_struct(plan)))
      {:ok, plan} -> IO.write(text(plan))
      {:error, error} -> throw({:failed, CLI.failure(@task, error, json: json)})
    end

    0
  catch
    {:failed, code} -> code
  end

  defp text(plan) do
    columns = [
      {"format", :left},
      {"layout", :left},
      {"bits/w", :right},
      {"weights", :right},
      {"with cache", :right}
    ]

    fits = if plan.budget, do: [{"of #{Size.format(plan.budget)}", :left}], else: []

    [
      "#{plan.model}: #{Float.round(plan.parameters / 1.0e9, 2)} billion parameters; ",
      "keys and values of #{plan.context} positions",
      if(plan.batch > 1, do: " x #{plan.batch}", else: ""),
      ": #{Size.format(plan.cache_bytes)}\n\n",
      Table.text(columns ++ fits, for(row <- plan.rows, do: cells(row, plan.budget)))
    ]
  end

  defp cells(row, budget) do
    [
      row.name,
      row.layout,
      :erlang.float_to_binary(row.bits_per_weight, decimals: 3),
      Size.format(row.weight_bytes),
      Size.format(row.total_bytes)
    ] ++ if(budget, do: [verdict(row)], else: [])
  end

  defp verdict(%{fits: true, spare_bytes: spare}), do: "fits, #{Size.format(spare)} to spare"
  defp verdict(%{spare_bytes: spare}), do: "#{Size.format(-spare)} too much"
end
