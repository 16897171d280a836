# How much sooner a job is done with a second node, each with one native thread and one
# unit at a time. Needs the test environment, which starts nodes of its own:
#
#     MIX_ENV=test mix run bench/cluster.exs
#     ... bench/cluster.exs --repeats 9 --tensors 48 --format int4

alias VivaTensor.{Job, Table}
alias VivaTensor.Test.{Cluster, Safetensors}

{options, [], []} =
  OptionParser.parse(System.argv(),
    strict: [repeats: :integer, tensors: :integer, format: :string]
  )

Logger.configure(level: :info)
repeats = Keyword.get(options, :repeats, 5)
tensors = Keyword.get(options, :tensors, 120)
format = options |> Keyword.get(:format, "nf4") |> String.to_atom()
root = Path.join(System.tmp_dir!(), "viva_tensor_cluster_#{System.pid()}")

Cluster.start!()
[first, second] = for _ <- 1..2, do: Cluster.peer!(threads: 1)

try do
  source = Path.join(root, "model.safetensors")
  row = Safetensors.normal(4096, 1)
  bytes = :binary.copy(row, 1024)

  Safetensors.write!(
    source,
    for(n <- 1..tensors, do: {"layers.#{n}.weight", "F32", [1024, 4096], bytes})
  )

  # The job runs on the first node, alone or with the second.
  run = fn nodes ->
    to = Path.join(root, "out")

    opts = [
      source: source,
      to: to,
      format: format,
      method: :mse,
      max_concurrency: 1,
      nodes: nodes
    ]

    start = System.monotonic_time(:millisecond)
    {:ok, job} = :erpc.call(first.node, Job, :start, [opts])
    {:ok, report} = :erpc.call(first.node, Job, :await, [job], :infinity)
    milliseconds = System.monotonic_time(:millisecond) - start
    File.rm_rf!(to)

    {milliseconds / 1000,
     Enum.frequencies_by(report.tensors, &(&1[:node] == second.node))[true] || 0}
  end

  run.([])

  rows =
    for n <- 1..repeats do
      {alone, 0} = run.([])
      {both, there} = run.([second.node])
      [n, alone, both, there, Float.round(alone / both, 2)]
    end

  columns =
    for title <- ["round", "one node s", "two nodes s", "units there", "ratio"],
        do: {title, :right}

  IO.puts(Table.text(columns, rows))
  ratios = rows |> Enum.map(&List.last/1) |> Enum.sort()
  IO.puts("median ratio #{Enum.at(ratios, div(repeats, 2))}")
after
  Enum.each([first, second], &Cluster.stop/1)
  File.rm_rf!(root)
end
