defmodule VivaTensor.CLI.Compare do
  @moduledoc false
  # The work behind `mix viva.compare`: formats and methods in a table, as JSON, in a plot.

  alias VivaTensor.{Calibration, CLI, Compare}
  alias VivaTensor.CLI.{Progress, Style}
  alias VivaTensor.Job.FileError

  @behaviour CLI

  @task "viva.compare"
  @switches [
    tensor: :string,
    formats: :string,
    methods: :string,
    scales: :string,
    activations: :string,
    held_out: :string,
    svg: :string,
    json: :boolean
  ]

  # Names in a list past which the rest are only counted.
  @named 3

  @methods ~w(rtn mse hqq) ++ Enum.map(Calibration.methods(), &to_string/1)

  @impl CLI
  def switches, do: @switches

  @doc """
  Reads the flags.

      iex> VivaTensor.CLI.Compare.parse(["model", "--formats", "int4,nf4", "--scales", "mse"])
      {:ok, [source: "model", formats: [:int4, :nf4], scales: :mse]}
  """
  @impl CLI
  @spec parse([String.t()]) :: {:ok, keyword} | :help | {:error, String.t()}
  def parse(argv) do
    case CLI.parse(argv, @switches) do
      {:ok, flags, [source]} ->
        with {:ok, _} <- CLI.values(flags, scales: ~w(rtn mse)),
             {:ok, _} <- CLI.values(each(flags, :methods), methods: @methods),
             do: {:ok, [source: source] ++ Enum.map(flags, &names/1)}

      {:ok, _flags, []} ->
        {:error, "which WEIGHTS?"}

      {:ok, _flags, [_, extra | _]} ->
        {:error, "one WEIGHTS at a time; what is #{inspect(extra)}?"}

      other ->
        other
    end
  end

  defp each(flags, key) do
    for list <- Keyword.get_values(flags, key), name <- split(list), do: {key, name}
  end

  defp names({key, list}) when key in [:formats, :methods],
    do: {key, list |> split() |> Enum.map(&String.to_atom/1)}

  defp names({:scales, name}), do: {:scales, String.to_atom(name)}
  defp names(flag), do: flag

  defp split(list), do: String.split(list, [",", " "], trim: true)

  @doc "Compares and prints. The application must be started."
  @impl CLI
  @spec run(keyword) :: CLI.exit_code()
  def run(flags) do
    {own, options} = Keyword.split(flags, [:source, :json, :svg])
    progress = Progress.new()
    ours = [progress: {progress, &Progress.show/2}, histograms: own[:json] == true]
    result = Compare.run(own[:source], ours ++ options)
    Progress.finish(progress)

    with {:ok, compared} <- result,
         :ok <- write(own[:svg], compared) do
      if own[:json] do
        IO.puts(CLI.json(Map.from_struct(compared)))
      else
        IO.write(text(compared))
      end

      0
    else
      {:error, error} -> CLI.failure(@task, error, json: own[:json])
    end
  end

  defp write(nil, _compared), do: :ok

  defp write(path, compared) do
    path |> File.write(Compare.svg(compared)) |> FileError.wrap(:output, path)
  end

  defp text(compared) do
    count = length(compared.tensors)
    partial? = Enum.any?(compared.rows, &(&1.tensors < count))

    columns =
      [{"format", :left}, {"method", :left}] ++
        if(partial?, do: [{"tensors", :right}], else: []) ++
        [{"bits/w", :right}, {"SQNR dB", :right}] ++
        if(compared.measured_on, do: [{"output error", :right}], else: []) ++
        [{"seconds", :right}, {"front", :left}]

    rows =
      for row <- compared.rows do
        [row.format, row.method] ++
          if(partial?, do: [row.tensors], else: []) ++
          [decimals(row.bits_per_weight, 3), decimals(row.sqnr_db, 2)] ++
          if(compared.measured_on, do: [decimals(row.output_error, 5)], else: []) ++
          [decimals(row.seconds, 2), if(row.front, do: Style.paint("*", :good))]
      end

    [
      "#{compared.source}: #{Compare.about(compared)}\n\n",
      Style.table(columns, rows),
      "\n* no other has fewer bits and less error\n",
      if(compared.measured_on, do: measured_on(compared, count), else: []),
      left_out(compared.left_out),
      absent(compared.absent, count)
    ]
  end

  defp measured_on(compared, count) do
    mean = if count > 1, do: ", the mean of the layers", else: ""
    "output error: #{Compare.measured_on(compared)}#{mean}\n"
  end

  defp left_out([]), do: []

  defp left_out(names),
    do: "left out, without activations: #{tensors(names)} (#{listed(names)})\n"

  # One line for each reason, with those that it is true of.
  defp absent(absent, count) do
    for {{reason, tensors}, all} <- Enum.group_by(absent, &{&1.reason, &1.tensors}) do
      who =
        for {format, same} <- Enum.group_by(all, & &1.format),
            do: "#{format} (#{Enum.map_join(same, ", ", & &1.method)})"

      where = if length(tensors) < count, do: " for #{tensors(tensors)} (#{listed(tensors)})"

      "not measured#{where}: #{Enum.join(who, ", ")}: #{reason}\n"
    end
  end

  defp tensors([_]), do: "1 tensor"
  defp tensors(names), do: "#{length(names)} tensors"

  defp listed(names) do
    {shown, rest} = Enum.split(names, @named)
    Enum.join(shown, ", ") <> if(rest == [], do: "", else: " and #{length(rest)} more")
  end

  defp decimals(nil, _digits), do: "-"
  defp decimals(number, digits), do: :erlang.float_to_binary(number / 1, decimals: digits)
end
