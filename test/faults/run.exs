# Kills real VMs in the middle of their jobs, and goes on with what they leave:
#
#     make faults                       (mix run test/faults/run.exs in the test environment)
#     ... run.exs --seed 7 --moments 50
#
# - SIGKILL at seeded random moments across a job, as many as asked for, and half as many
#   across one that compresses vectors, and a fifth across one of a huge tensor, of which
#   units do ranges of rows,
# - SIGKILL before every sync, rename and unlink of a job, once as it is and once with
#   everything lost that was not synced, as a power cut does it; of both, and of a job that
#   replaces an output, which is there as it was until the new one is,
# - bytes changed in what a killed VM had finished,
# - a disk that is full and has room later,
# - workers killed at random while a job runs,
# - another node that is killed, or frozen and woken again, while it does units,
# - a source that changed.
#
# After each the output has to have the bytes of a job that nothing interrupted, with
# nothing left beside it. A killed job may do again no more than its largest unit for each
# worker. The first loss ends the run with a message and exit code 1.

alias VivaTensor.{Job, Table}
alias VivaTensor.Test.{Cluster, Faults, Jobs}

Logger.configure(level: :info)

{options, [], []} = OptionParser.parse(System.argv(), strict: [seed: :integer, moments: :integer])

seed = Keyword.get(options, :seed, 1)
moments = Keyword.get(options, :moments, 50)
:rand.seed(:exsss, seed)
root = Path.join(System.tmp_dir!(), "viva_tensor_faults_#{System.pid()}")
model = "examples/models/viva-tiny"
started = System.monotonic_time(:millisecond)

counts = fn run -> run.killed and run.changed end
seconds = fn -> div(System.monotonic_time(:millisecond) - started, 1000) end

done = fn what, runs, redone ->
  {runs, counted} =
    if is_list(runs), do: {length(runs), Enum.count(runs, counts)}, else: {runs, runs}

  IO.puts(
    "#{what}: #{runs} runs, #{counted} as asked for, no byte lost or wrong (#{seconds.()} s)"
  )

  [what, runs, counted, redone]
end

# Runs until so many came when the job had not ended and there was something to change.
until = fn count, run ->
  Stream.repeatedly(run)
  |> Enum.reduce_while([], fn run, runs ->
    runs = [run | runs]
    {if(Enum.count(runs, counts) < count, do: :cont, else: :halt), runs}
  end)
end

# Before call 1, 2, … until the job makes no more calls.
every_boundary = fn scene, library, opts ->
  Stream.iterate(1, &(&1 + 1))
  |> Stream.map(&Faults.killed_at(scene, library, &1, opts))
  |> Enum.take_while(& &1.killed)
  |> length()
end

flip = fn path ->
  size = File.stat!(path).size
  {:ok, file} = :file.open(path, [:read, :write, :raw, :binary])
  at = :rand.uniform(size) - 1
  {:ok, <<byte>>} = :file.pread(file, at, 1)
  :ok = :file.pwrite(file, at, <<Bitwise.bxor(byte, 1 + :rand.uniform(254))>>)
  :ok = :file.close(file)
end

try do
  source = Faults.source!(Path.join(root, "source/model.safetensors"), 40)
  shards = [format: :nf4, double_quant: true, max_shard_size: "2MB"]
  scene = Faults.scene!(Path.join(root, "large"), source, shards)

  # The first one also reads its files from the disk.
  length = Enum.min(for _ <- 1..4, do: Faults.duration(scene))

  IO.puts(
    "seed #{seed}; a job takes about #{length} ms, and may do #{scene.may_redo} bytes again"
  )

  random =
    until.(moments, fn ->
      run = Faults.killed_after(scene, :rand.uniform(length))
      if run.redone > scene.may_redo, do: raise("#{run.redone} bytes were done again")
      run
    end)

  redone = random |> Enum.map(& &1.redone) |> Enum.max()
  rows = [done.("SIGKILL at random moments", random, redone)]

  matrix = Faults.huge!(Path.join(root, "huge/model.safetensors"))
  huge = Faults.scene!(Path.join(root, "huge/out"), matrix, format: :int8)
  vectors = Faults.vectors!(Path.join(root, "source/vectors.npy"), 5)
  codes = [codes: :binary, rescore: :none, queries: 5]
  streamed = Faults.scene!(Path.join(root, "vectors"), vectors, codes)

  rows =
    for {scene, of, part} <- [{streamed, "vectors", 2}, {huge, "a huge tensor", 5}],
        reduce: rows do
      rows ->
        long = Enum.min(for _ <- 1..2, do: Faults.duration(scene))

        random =
          until.(div(moments, part), fn ->
            run = Faults.killed_after(scene, :rand.uniform(long))
            if run.redone > scene.may_redo, do: raise("#{run.redone} bytes were done again")
            run
          end)

        redone = random |> Enum.map(& &1.redone) |> Enum.max()
        rows ++ [done.("SIGKILL at random moments, #{of}", random, redone)]
    end

  damaged =
    until.(div(moments, 4), fn ->
      Faults.killed_after(scene, :rand.uniform(length), fn ->
        "#{scene.dir}/.out.partial/{shard-*,.manifest}"
        |> Path.wildcard(match_dot: true)
        |> Enum.filter(fn _ -> :rand.uniform(3) == 1 end)
        |> Enum.map(flip)
        |> Enum.any?()
      end)
    end)

  rows = rows ++ [done.("bytes changed in what was finished", damaged, "-")]

  rows =
    case Faults.compile(root) do
      nil ->
        IO.puts("SKIPPED: every sync and rename, and power cuts: there is no cc to compile with")
        rows

      library ->
        small = [format: :nf4, max_concurrency: 1, max_shard_size: "600KB"]
        tiny = Faults.scene!(Path.join(root, "tiny"), model, small)
        whole = [format: :int8, force: true]
        replacing = Faults.scene!(Path.join(root, "replacing"), model, whole)

        for {what, opts} <- [{"SIGKILL", []}, {"power cut", [power: :cut]}],
            {scene, of} <- [
              {tiny, ""},
              {replacing, ", replacing"},
              {streamed, ", vectors"},
              {huge, ", a huge tensor"}
            ],
            reduce: rows do
          rows ->
            runs = every_boundary.(scene, library, opts)
            rows ++ [done.("#{what} before every sync and rename#{of}", runs, "-")]
        end
    end

  rows =
    for {scene, of} <- [{scene, ""}, {streamed, ", vectors"}], reduce: rows do
      rows ->
        case Faults.full_disk(scene) do
          :not_allowed ->
            IO.puts("SKIPPED: a full disk: this process may not mount a file system")
            rows

          runs ->
            rows ++ [done.("a full disk#{of}", runs, "-")]
        end
    end

  workers =
    for _ <- 1..div(moments, 4) do
      {:ok, job} = Job.start([to: scene.to] ++ scene.opts)
      Faults.kill_workers(job, fn -> Process.sleep(:rand.uniform(20)) end)
      # What was killed three times is put aside or ends the job, and is tried again.
      with {kind, _} when kind in [:partial, :error] <- Job.await(job) do
        {:ok, job} = Job.start([to: scene.to, resume: true] ++ scene.opts)
        {:ok, _} = Job.await(job)
      end

      true = Jobs.digests(scene.to) == scene.digests
      File.rm_rf!(scene.to)
    end

  rows = rows ++ [done.("workers killed at random", length(workers), "-")]

  changed =
    until.(div(moments, 10), fn ->
      Faults.killed_after(scene, div(length, 2), fn -> Faults.refuses_another_source!(scene) end)
    end)

  rows = rows ++ [done.("a source that changed", changed, "-")]

  Cluster.start!()

  rows =
    for {what, signal, count} <- [{"killed", "KILL", 5}, {"frozen", "STOP", 2}], reduce: rows do
      rows ->
        runs = until.(count, fn -> Faults.lost_node(scene, signal, :rand.uniform(100)) end)
        rows ++ [done.("another node #{what}", runs, "-")]
    end

  columns = [
    {"fault", :left},
    {"runs", :right},
    {"interrupted as asked for", :right},
    {"most bytes redone", :right}
  ]

  IO.puts(["\n", Table.text(columns, rows)])
after
  File.rm_rf!(root)
end
