# A checkpoint of very many very small tensors through a job: what a unit costs beside
# its work, and what the job's process holds.
#
#     mix run bench/many_units.exs [--units 1000000] [--directory DIR]
#
# Every tensor has 32 elements and is kept, being too small to quantize. DIR had better be in memory, where it is
# by default if there is such a place: what is measured is the job, not the disk. Planning
# is reading the header and deciding for every tensor, running all units, publishing the
# report and the rest.

defmodule ManyUnits do
  alias VivaTensor.{Job, Table}

  @elements 32

  def run(argv) do
    {options, [], []} = OptionParser.parse(argv, strict: [units: :integer, directory: :string])
    units = Keyword.get(options, :units, 1_000_000)
    parent = if File.dir?("/dev/shm"), do: "/dev/shm", else: System.tmp_dir!()
    parent = Keyword.get(options, :directory, parent)
    directory = Path.join(parent, "viva_tensor_many_#{System.pid()}")
    File.mkdir_p!(directory)

    try do
      source = Path.join(directory, "model.safetensors")
      # In a process of its own, whose memory goes with it.
      Task.await(Task.async(fn -> write(source, units) end), :infinity)
      measure(source, Path.join(directory, "out"), units)
    after
      File.rm_rf!(directory)
    end
  end

  defp measure(source, to, units) do
    start = now()
    {:ok, job} = Job.start(source: source, to: to, format: :int8)
    watch = Task.async(fn -> watch(job, start, units, %{}) end)
    {:ok, %{kept: ^units}} = Job.await(job)
    ended = now()
    seen = Task.await(watch)
    planned = seen[:planned] - start
    running = seen[:settled] - seen[:planned]

    rows = [
      ["planning", seconds(planned), "s"],
      ["running", seconds(running), "s"],
      ["publishing", seconds(ended - seen[:settled]), "s"],
      ["all", seconds(ended - start), "s"],
      ["a unit", Float.round(running / units, 1), "µs"],
      ["job's process, planned", megabytes(seen[:memory_planned]), "MB"],
      ["a tenth done", megabytes(seen[:memory_tenth]), "MB"],
      ["all done", megabytes(seen[:memory_settled]), "MB"]
    ]

    IO.write(Table.text([{"#{units} units", :left}, {"", :right}, {"", :left}], rows))
  end

  # Looks often enough for what takes seconds, and seldom enough not to be measured.
  defp watch(job, start, units, seen) do
    {:ok, status} = Job.status(job)

    seen =
      case status do
        %{state: :planning} -> seen
        %{tensors_done: ^units} -> put(seen, :settled, :memory_settled, job)
        %{tensors_done: n} when n >= div(units, 10) -> put(seen, nil, :memory_tenth, job)
        _ -> put(seen, :planned, :memory_planned, job)
      end

    if seen[:settled] do
      Map.put_new(seen, :planned, start)
    else
      Process.sleep(20)
      watch(job, start, units, seen)
    end
  end

  defp put(seen, time, memory, job) do
    if is_map_key(seen, memory) do
      seen
    else
      # What is held, without what could be collected.
      :erlang.garbage_collect(job)
      {:memory, bytes} = Process.info(job, :memory)
      seen = Map.put(seen, memory, bytes)
      if time, do: Map.put(seen, time, now()), else: seen
    end
  end

  defp write(path, units) do
    size = 4 * @elements

    entries =
      Enum.map_intersperse(0..(units - 1), ",", fn i ->
        ~s("t#{i}.weight":{"dtype":"F32","shape":[1,#{@elements}],"data_offsets":[#{i * size},#{(i + 1) * size}]})
      end)

    header = IO.iodata_to_binary(["{", entries, "}"])
    header = String.pad_trailing(header, div(byte_size(header) + 7, 8) * 8)
    row = for i <- 1..@elements, into: <<>>, do: <<i / @elements::float-32-little>>
    File.write!(path, [<<byte_size(header)::little-64>>, header, :binary.copy(row, units)])
  end

  defp now, do: System.monotonic_time(:microsecond)
  defp seconds(microseconds), do: Float.round(microseconds / 1.0e6, 2)
  defp megabytes(bytes), do: Float.round(bytes / 1.0e6, 1)
end

# A line for each unit is not what is measured.
Logger.configure(level: :info)
ManyUnits.run(System.argv())
