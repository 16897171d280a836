# A synthetic sharded checkpoint, compressed by a job to one format after the other,
# while a normal process ticks every millisecond and the runtime watches for long
# schedules:
#
#     mix run bench/large_checkpoint.exs [--gigabytes 2] [--dtype bf16] [--memory-limit 512MB]
#         [--embedding 0]
#         [--format int8 --format q4_0 --format nf4 --format q4_k]
#
# The defaults are the checkpoint of 2.02 GB and 35 tensors in bf16, five layers of
# LLaMA-7B's shapes; --embedding adds one tensor of so many gigabytes. A format is the recipe of that name where there is one.
#
# For each it prints, side by side with what the disk and a reader took in the same
# minute: wall and CPU seconds, what of the wall came after the last tensor (syncing
# and publishing), peak resident memory (mapped pages included), how late the ticker
# ever was, and how many NIFs held a scheduler over 5 ms.

Code.require_file("../test/support/ticker.ex", __DIR__)
Code.require_file("../test/support/os_process.ex", __DIR__)

defmodule LargeCheckpoint do
  alias VivaTensor.{CLI, Job, Native, Recipe, Table, Telemetry, Tensor}
  alias VivaTensor.Test.{OSProcess, Ticker}

  @hidden 4096
  @ffn 11_008
  @formats ~w(int8 q4_0 nf4 q4_k)
  # Lends its tokenizer, which a GGUF file holds too, and what its config.json says.
  @model "examples/models/viva-tiny"
  @piece 4 * 1024 * 1024
  @draws 1_000_000

  def run(argv) do
    {options, [], []} =
      OptionParser.parse(argv,
        strict:
          [gigabytes: :integer, embedding: :integer, dtype: :string] ++
            [format: :keep, memory_limit: :string]
      )

    formats = with [] <- Keyword.get_values(options, :format), do: @formats
    limit = Keyword.get(options, :memory_limit, "512MB")
    directory = Path.join(System.tmp_dir!(), "viva_tensor_large_#{System.pid()}")

    try do
      source = Path.join(directory, "source")
      # In a process of its own, whose memory goes with it.
      Task.await(Task.async(fn -> write(source, options) end), :infinity)
      # Modules are loaded, as mix does at their first use, before anything is timed.
      {:ok, _} = job(@model, directory, hd(formats), limit)
      {_, idle} = Ticker.beside(fn -> Process.sleep(3000) end)
      rows = for format <- formats, do: measure(source, directory, format, limit)
      IO.puts("memory limit #{limit}; latest tick with no job #{ms(idle)} ms late\n")
      IO.write(table(rows))
    after
      File.rm_rf!(directory)
    end
  end

  defp measure(source, directory, format, limit) do
    # Writing the source back to disk is not what is measured.
    {_, 0} = System.cmd("sync", [])
    read = seconds(fn -> read(source) end)
    OSProcess.reset_peak()
    :erlang.system_monitor(self(), [{:long_schedule, 5}])
    last_unit = :atomics.new(1, [])
    :ok = Telemetry.attach(__MODULE__, [[:viva_tensor, :unit, :stop]], &stamp/4, last_unit)
    {cpu, start} = {OSProcess.cpu_seconds(), now()}

    {{:ok, report}, latest} = Ticker.beside(fn -> job(source, directory, format, limit) end)
    stop = now()

    row = %{
      format: format,
      wall: (stop - start) / 1.0e6,
      after_units: (stop - :atomics.get(last_unit, 1)) / 1.0e6,
      cpu: OSProcess.cpu_seconds() - cpu,
      peak_mb: OSProcess.status("VmHWM") / 1000,
      latest: latest,
      long_schedules: length(long_schedules([]))
    }

    :ok = Telemetry.detach(__MODULE__)
    :erlang.system_monitor(:undefined)
    File.rm_rf!(report.target)
    {_, 0} = System.cmd("sync", [])
    written = seconds(fn -> write_synced(Path.join(directory, "probe"), report.output_bytes) end)
    Map.merge(row, %{read: read, written: written})
  end

  defp table(rows) do
    columns =
      for title <- [
            "wall s",
            "CPU s",
            "after units s",
            "read s",
            "write + fsync s",
            "wall / both",
            "peak MB",
            "late ms",
            "long schedules"
          ],
          do: {title, :right}

    rows =
      for row <- rows do
        seconds = [row.wall, row.cpu, row.after_units, row.read, row.written]
        ratio = row.wall / (row.read + row.written)

        [row.format | Enum.map(seconds, &Float.round(&1, 2))] ++
          [Float.round(ratio, 2), round(row.peak_mb), ms(row.latest), row.long_schedules]
      end

    Table.text([{"format", :left} | columns], rows)
  end

  defp job(source, directory, format, limit) do
    {:ok, job} =
      Job.start(
        source: source,
        to: Path.join(directory, "#{Path.basename(source)}-#{format}"),
        recipe: recipe(format),
        memory_limit: limit
      )

    Job.await(job, :infinity)
  end

  defp recipe(format) do
    name = String.to_atom(format)

    {:ok, recipe} = with {:error, _} <- Recipe.new(name, []), do: Recipe.new(format: name)
    recipe
  end

  defp stamp(_event, _measurements, _metadata, last), do: :atomics.put(last, 1, now())

  defp now, do: System.monotonic_time(:microsecond)

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

  # What the machine takes at least

  defp seconds(work), do: (work |> :timer.tc() |> elem(0)) / 1.0e6

  # On one thread, out of the page cache if it is there.
  defp read(directory) do
    for path <- Path.wildcard(Path.join(directory, "*.safetensors")) do
      path |> File.stream!([], @piece) |> Stream.run()
    end
  end

  defp write_synced(path, bytes) do
    File.open!(path, [:write, :raw, :binary], fn file ->
      fill(file, :binary.copy(<<1>>, @piece), bytes)
      :ok = :file.sync(file)
    end)

    File.rm!(path)
  end

  # The source: layers of LLaMA-7B's shapes, one a shard.

  defp write(directory, options) do
    File.mkdir_p!(directory)
    dtype = Keyword.get(options, :dtype, "bf16")
    noise = noise(dtype)
    size = div(byte_size(noise), @draws)

    linear =
      [{"self_attn.q_proj", @hidden, @hidden}, {"self_attn.k_proj", @hidden, @hidden}] ++
        [{"self_attn.v_proj", @hidden, @hidden}, {"self_attn.o_proj", @hidden, @hidden}] ++
        [{"mlp.gate_proj", @ffn, @hidden}, {"mlp.up_proj", @ffn, @hidden}] ++
        [{"mlp.down_proj", @hidden, @ffn}]

    layer = Enum.sum(for {_, n, k} <- linear, do: n * k * size)
    layers = div(Keyword.get(options, :gigabytes, 2) * 1_000_000_000 + layer - 1, layer)

    map =
      for i <- 1..layers, reduce: %{} do
        map ->
          file = "model-#{pad(i)}-of-#{pad(layers)}.safetensors"

          tensors =
            for {name, n, k} <- linear,
                do: {"model.layers.#{i - 1}.#{name}.weight", [n, k], n * k * size}

          shard(Path.join(directory, file), String.upcase(dtype), tensors, noise)
          for {name, _, _} <- tensors, into: map, do: {name, file}
      end

    map = Map.merge(map, embedding(directory, options, size, noise))
    json(directory, "model.safetensors.index.json", %{metadata: %{}, weight_map: map})
    File.cp!(Path.join(@model, "tokenizer.json"), Path.join(directory, "tokenizer.json"))
    {:ok, config} = @model |> Path.join("config.json") |> File.read!() |> Native.json_decode()

    json(directory, "config.json", %{
      config
      | "hidden_size" => @hidden,
        "intermediate_size" => @ffn,
        "num_attention_heads" => 32,
        "num_key_value_heads" => 32,
        "head_dim" => 128,
        "num_hidden_layers" => layers
    })
  end

  # One tensor of so many gigabytes, which is quantized like the others.
  defp embedding(directory, options, size, noise) do
    case div(Keyword.get(options, :embedding, 0) * 1_000_000_000, @hidden * size) do
      0 ->
        %{}

      rows ->
        {name, file} = {"model.per_layer.weight", "embedding.safetensors"}
        tensors = [{name, [rows, @hidden], rows * @hidden * size}]
        dtype = options |> Keyword.get(:dtype, "bf16") |> String.upcase()
        shard(Path.join(directory, file), dtype, tensors, noise)
        %{name => file}
    end
  end

  defp json(directory, name, value) do
    {:ok, json} = Native.json_encode(value, true)
    File.write!(Path.join(directory, name), json)
  end

  defp shard(path, dtype, tensors, noise) do
    {entries, _} =
      Enum.map_reduce(tensors, 0, fn {name, shape, size}, at ->
        {{name, %{dtype: dtype, shape: shape, data_offsets: [at, at + size]}}, at + size}
      end)

    {:ok, header} = Native.json_encode(Map.new(entries), false)

    File.open!(path, [:write, :raw, :binary], fn file ->
      :ok = :file.write(file, [<<byte_size(header)::64-little>>, header])
      for {_, _, size} <- tensors, do: fill(file, noise, size)
    end)
  end

  # Repeated: quantizing takes as long as on any other.
  defp noise(dtype) do
    [@draws]
    |> CLI.Quality.draws()
    |> Tensor.from_binary!(:f32, [@draws])
    |> Tensor.cast!(String.to_atom(dtype))
    |> Tensor.to_binary!()
  end

  defp pad(i), do: String.pad_leading(to_string(i), 5, "0")

  defp fill(_file, _noise, 0), do: :ok

  defp fill(file, noise, left) do
    size = min(left, byte_size(noise))
    :ok = :file.write(file, binary_part(noise, 0, size))
    fill(file, noise, left - size)
  end
end

# A line for each unit is not what is measured.
Logger.configure(level: :info)
LargeCheckpoint.run(System.argv())
