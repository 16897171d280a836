# Compresses the bundled language model three ways, each with a supervised job, and
# compares them. What it leaves in demo/ are directories that transformers loads.
#
#     mix run examples/demo.exs        (or bin/demo, or make demo)

alias VivaTensor.{Job, Report, Size, Table}

source = "examples/models/viva-tiny"

recipes = [
  {"demo/int8", [format: :int8]},
  {"demo/nf4", [format: :nf4, double_quant: true]},
  {"demo/int4", [format: :int4]}
]

File.rm_rf!("demo")

reports =
  for {to, recipe} <- recipes do
    {:ok, job} = Job.start([source: source, to: to] ++ recipe)

    case Job.await(job) do
      {:ok, report} ->
        IO.puts(Report.table(report))
        report

      {:error, error} ->
        IO.puts(:stderr, "#{to}: #{error.message}")
        exit({:shutdown, 1})
    end
  end

two_decimals = &:erlang.float_to_binary(&1, decimals: 2)

[original | _] = reports
[%{dtype: dtype} | _] = original.tensors

columns = [
  {"viva-tiny as", :left},
  {"weights on disk", :right},
  {"smaller", :right},
  {"bits per quantized weight", :right},
  {"SQNR dB", :right},
  {"quantized", :right},
  {"kept", :right}
]

first = [dtype, Size.format(original.input_bytes), "1.00x", nil, nil, 0, length(original.tensors)]

rows =
  for report <- reports do
    [
      Report.describe(report.recipe),
      Size.format(report.output_bytes),
      two_decimals.(report.ratio) <> "x",
      two_decimals.(report.bits_per_weight),
      two_decimals.(report.sqnr_db),
      report.quantized,
      report.kept
    ]
  end

IO.puts(Table.markdown(columns, [first | rows]))
IO.puts("Wrote #{Enum.map_join(recipes, ", ", &elem(&1, 0))}.")
