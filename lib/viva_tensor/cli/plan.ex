defmodule VivaTensor.CLI.Plan do
  @moduledoc false
  # The work behind `mix viva.plan`: what a model takes in each format, and what fits.

  alias VivaTensor.{CLI, Error, Plan, Size}
  alias VivaTensor.CLI.Style

  @behaviour CLI

  @task "viva.plan"
  @switches [budget: :string, vram: :string, context: :integer, batch: :integer, json: :boolean]

  @impl CLI
  def switches, do: @switches

  @doc """
  Reads the flags.

      iex> VivaTensor.CLI.Plan.parse(["llama-7b", "--vram", "24GB"])
      {:ok, [models: ["llama-7b"], budget: "24GB"]}
  """
  @impl CLI
  @spec parse([String.t()]) :: {:ok, keyword} | :help | {:error, String.t()}
  def parse(argv) do
    case CLI.parse(argv, @switches) do
      {:ok, _flags, []} -> {:error, "which MODEL?"}
      {:ok, flags, models} -> {:ok, [models: models] ++ for({k, v} <- flags, do: {key(k), v})}
      other -> other
    end
  end

  defp key(:vram), do: :budget
  defp key(key), do: key

  @doc "Prints the estimates. The application must be started."
  @impl CLI
  @spec run(keyword) :: CLI.exit_code()
  def run(flags) do
    {[models: models], options} = Keyword.split(flags, [:models])
    {json, options} = Keyword.pop(options, :json, false)

    case estimates(models, options) do
      {:ok, plans} when json -> plans |> to_data() |> CLI.json() |> IO.puts()
      {:ok, plans} -> IO.write(text(plans))
      {:error, error} -> throw({:failed, CLI.failure(@task, error, json: json)})
    end

    0
  catch
    {:failed, code} -> code
  end

  defp estimates(models, options) do
    Enum.reduce_while(models, {:ok, []}, fn model, {:ok, plans} ->
      case Plan.estimate(model, options) do
        {:ok, plan} -> {:cont, {:ok, plans ++ [plan]}}
        {:error, error} -> {:halt, {:error, or_known(error, model)}}
      end
    end)
  end

  # What is no path may be a name that was meant otherwise.
  defp or_known(%Error{reason: {:io, %{code: "enoent"}}} = error, model) do
    %{error | message: error.message <> CLI.suggestion(model, Plan.models())}
  end

  defp or_known(error, _model), do: error

  defp to_data([plan]), do: Map.from_struct(plan)
  defp to_data(plans), do: Enum.map(plans, &Map.from_struct/1)

  defp text([plan]) do
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
      Style.table(columns ++ fits, for(row <- plan.rows, do: cells(row, plan.budget)))
    ]
  end

  # One column for each model.
  defp text([plan | _] = plans) do
    columns = [{"format", :left} | for(plan <- plans, do: {plan.model, :right})]

    [
      "Weights, with keys and values of #{plan.context} positions",
      if(plan.batch > 1, do: " x #{plan.batch}", else: ""),
      if(plan.budget, do: "; * fits in #{Size.format(plan.budget)}", else: ""),
      "\n\n",
      Style.table(
        columns,
        for rows <- plans |> Enum.map(& &1.rows) |> Enum.zip_with(& &1) do
          [name(rows) | Enum.map(rows, &total/1)]
        end
      )
    ]
  end

  # Models as they are may be of several dtypes.
  defp name(rows) do
    case rows |> Enum.map(& &1.name) |> Enum.uniq() do
      [name] -> name
      names -> Enum.join(names, ", ")
    end
  end

  defp total(%{total_bytes: bytes, fits: nil}), do: Size.format(bytes)
  defp total(%{total_bytes: bytes, fits: true}), do: Size.format(bytes) <> " *"
  defp total(%{total_bytes: bytes, fits: false}), do: Size.format(bytes) <> "  "

  defp cells(row, budget) do
    [
      row.name,
      row.layout,
      :erlang.float_to_binary(row.bits_per_weight, decimals: 3),
      Size.format(row.weight_bytes),
      Size.format(row.total_bytes)
    ] ++ if(budget, do: [verdict(row)], else: [])
  end

  defp verdict(%{fits: true, spare_bytes: spare}),
    do: Style.paint("fits, #{Size.format(spare)} to spare", :good)

  defp verdict(%{spare_bytes: spare}), do: Style.paint("#{Size.format(-spare)} too much", :bad)
end
