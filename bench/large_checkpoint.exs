# A synthetic sharded checkpoint, compressed by a job, while a normal process
# ticks every millisecond and the runtime watches for long schedules:
#
#     mix run bench/large_checkpoint.exs [--gigabytes 4] [--format nf4] [--memory-limit 512MB]
#
# Prints peak resident memory (mapped pages included), how busy the cores were,
# how late the ticker ever was, and every NIF that held a scheduler over 5 ms.

defmodule LargeCheckpoint do
  alias VivaTensor.{Job, Report}

  @hidden 4096
  @ffn 11_008

  def run(argv) do
    {options, [], []} =
      OptionParser.parse(argv,
        strict: [gigabytes: :integer, format: :string, memory_limit: :string]
      )

    directory = Path.join(System.tmp_dir!(), "viva_tensor_large_#{System.pid()}")

    try do
      source = Path.join(directory, "source")
      # In a process of its own, whose memory goes with it.
      gigabytes = Keyword.get(options, :gigabytes, 4)
      Task.await(Task.async(fn -> write(source, gigabytes * 1_000_000_000) end), :infinity)
      measure(source, Path.join(directory, "target"), options)
    after
      File.rm_rf!(directory)
    end
  end

  defp measure(source, target, options) do
    # Writing the source back to disk is not what is measured, nor is loading
    # modules, which mix does at their first use.
    {_, 0} = System.cmd("sync", [])
    {:ok, _} = job("examples/models/viva-tiny", target <> "_first", options)
    {_, idle} = ticks_during(fn -> Process.sleep(3000) end)
    reset_peak()
    :erlang.system_monitor(self(), [{:long_schedule, 5}])
    {cpu, wall} = {cpu_seconds(), System.monotonic_time(:microsecond)}

    {{:ok, report}, latest} = ticks_during(fn -> job(source, target, options) end)
    seconds = (System.monotonic_time(:microsecond) - wall) / 1.0e6
    busy = (cpu_seconds() - cpu) / seconds / System.schedulers_online()

    IO.puts(Report.table(report))
    IO.puts("wall                #{Float.round(seconds, 2)} s")
    IO.puts("peak resident       #{Float.round(peak_kb() / 1000, 1)} MB")
    IO.puts("cores busy          #{round(busy * 100)} %")
    IO.puts("latest tick         #{ms(latest)} ms late (#{ms(idle)} ms with no job)")
    IO.puts("long schedules      #{length(long_schedules([]))}")
  end

  defp job(source, target, options) do
    {:ok, job} =
      Job.start(
        source: source,
        to: target,
        format: String.to_atom(Keyword.get(options, :format, "nf4")),
        memory_limit: Keyword.get(options, :memory_limit, "512MB")
      )

    Job.await(job, :infinity)
  end

  # Runs `work` beside a process that ticks every millisecond; how late, in
  # microseconds, the latest tick was.
  defp ticks_during(work) do
    ticker = spawn_link(fn -> tick(System.monotonic_time(:microsecond), 0) end)
    result = work.()
    send(ticker, {:stop, self()})
    {result, receive(do: ({:latest, latest} -> latest))}
  end

  defp tick(previous, latest) do
    receive do
      {:stop, to} -> send(to, {:latest, latest})
    after
      1 ->
        now = System.monotonic_time(:microsecond)
        tick(now, max(latest, now - previous - 1000))
    end
  end

  defp ms(microseconds), do: Float.round(microseconds / 1000, 1)

  defp long_schedules(seen) do
    receive do
      {:monitor, who, :long_schedule, what} ->
        IO.inspect({who, what}, label: "long schedule")
        long_schedules([what | seen])
    after
      0 -> seen
    end
  end

  defp reset_peak, do: File.write!("/proc/self/clear_refs", "5")

  defp peak_kb do
    [_, kb] = Regex.run(~r/VmHWM:\s+(\d+) kB/, File.read!("/proc/self/status"))
    String.to_integer(kb)
  end

  defp cpu_seconds do
    # User and system time, in hundredths of a second, after the command's name.
    fields = File.read!("/proc/self/stat") |> String.split(") ") |> List.last() |> String.split()
    (String.to_integer(Enum.at(fields, 11)) + String.to_integer(Enum.at(fields, 12))) / 100
  end

  # Layers of LLaMA-7B's shapes, f32, one a shard.
  defp write(directory, bytes) do
    File.mkdir_p!(directory)

    linear =
      [{"self_attn.q_proj", @hidden, @hidden}, {"self_attn.k_proj", @hidden, @hidden}] ++
        [{"self_attn.v_proj", @hidden, @hidden}, {"self_attn.o_proj", @hidden, @hidden}] ++
        [{"mlp.gate_proj", @ffn, @hidden}, {"mlp.up_proj", @ffn, @hidden}] ++
        [{"mlp.down_proj", @hidden, @ffn}]

    layer = Enum.sum(for {_, n, k} <- linear, do: n * k * 4)
    layers = div(bytes + layer - 1, layer)
    noise = noise()

    map =
      for i <- 1..layers, reduce: %{} do
        map ->
          file = "model-#{pad(i)}-of-#{pad(layers)}.safetensors"
          names = for {name, n, k} <- linear, do: {"model.layers.#{i - 1}.#{name}.weight", n, k}
          shard(Path.join(directory, file), names, noise)
          for {name, _, _} <- names, into: map, do: {name, file}
      end

    {:ok, index} = VivaTensor.Native.json_encode(%{metadata: %{}, weight_map: map}, true)
    File.write!(Path.join(directory, "model.safetensors.index.json"), index)
  end

  defp shard(path, tensors, noise) do
    {entries, _} =
      Enum.map_reduce(tensors, 0, fn {name, n, k}, at ->
        size = n * k * 4
        {{name, %{dtype: "F32", shape: [n, k], data_offsets: [at, at + size]}}, at + size}
      end)

    {:ok, header} = VivaTensor.Native.json_encode(Map.new(entries), false)

    File.open!(path, [:write, :raw, :binary], fn file ->
      :ok = :file.write(file, [<<byte_size(header)::64-little>>, header])
      for {_, n, k} <- tensors, do: fill(file, noise, n * k * 4)
    end)
  end

  defp fill(_file, _noise, 0), do: :ok

  defp fill(file, noise, left) do
    size = min(left, byte_size(noise))
    :ok = :file.write(file, binary_part(noise, 0, size))
    fill(file, noise, left - size)
  end

  # 4 MB of normal draws, repeated: quantizing takes as long as on any other.
  defp noise do
    :rand.seed(:exsss, 1)
    for _ <- 1..1_000_000, into: <<>>, do: <<:rand.normal() * 0.02::float-32-little>>
  end

  defp pad(i), do: String.pad_leading(to_string(i), 5, "0")
end

LargeCheckpoint.run(System.argv())
