defmodule VivaTensor.Vectors.JobTest do
  # How jobs of vectors begin, go on and end.
  use ExUnit.Case, async: false

  alias VivaTensor.{Job, Telemetry}
  alias VivaTensor.Test.{Directory, Jobs, OSProcess}
  alias VivaTensor.Test.Vectors, as: Made

  # Elements of a piece.
  @piece 4 * 1024 * 1024
  # Vectors of this dimension come three in a piece: many pieces from few.
  @dimension div(@piece, 1024)
  @count 5 * 1024 + 100

  setup do
    {:ok, dir: Directory.create!()}
  end

  # Five pieces and a bit, 82 MB in all, that take no time to make.
  defp many(count \\ @count) do
    block = VivaTensor.Test.Safetensors.normal(@dimension, 3)

    Stream.map(0..(count - 1), fn i ->
      cut = rem(i * 4 * 37, byte_size(block) - 4)
      binary_part(block, cut, byte_size(block) - cut) <> binary_part(block, 0, cut)
    end)
  end

  defp file!(dir) do
    path = Path.join(dir, "many.npy")
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (#{@count}, #{@dimension}), }"
    header = String.pad_trailing(header, 117) <> "\n"
    File.write!(path, [<<0x93, "NUMPY", 1, 0, byte_size(header)::little-16>>, header])
    many() |> Stream.into(File.stream!(path, [:append])) |> Stream.run()
    path
  end

  defp options(dir, name, opts) do
    [to: Path.join(dir, name), codes: :binary, queries: 20] ++ opts
  end

  test "it tells what it does", %{dir: dir} do
    test = self()
    id = make_ref()

    events = for event <- [:start, :stop], kind <- [:job, :unit], do: [:viva_tensor, kind, event]

    :ok =
      Telemetry.attach(id, events, fn name, measured, about, _ ->
        send(test, {name, measured, about})
      end)

    on_exit(fn -> Telemetry.detach(id) end)
    job = Jobs.start!(options(dir, "out", vectors: many(1500)))
    assert {:ok, report} = Job.await(job)
    assert report.vectors == 1500

    assert_received {:viva_tensor_job, ^job, {:planned, %{tensors: 0, bytes: 0}}}
    assert_received {:viva_tensor_job, ^job, {:unit, %{name: "vectors 0 to 1023"} = row}}
    assert {row.vectors, row.format} == {1024, :binary}
    assert_received {:viva_tensor_job, ^job, {:unit, %{name: "vectors 1024 to 1499"}}}
    assert_received {:viva_tensor_job, ^job, {:done, {:ok, ^report}}}
    assert_received {[:viva_tensor, :job, :start], _, %{job: ^job, format: :binary, source: nil}}
    assert_received {[:viva_tensor, :unit, :stop], %{input_bytes: _}, %{action: :encode}}
    assert_received {[:viva_tensor, :job, :stop], %{output_bytes: _}, %{job: ^job}}

    assert {:ok, status} = Job.status(job)
    assert {status.state, status.vectors} == {:done, %{done: 1500, of: nil}}
    assert status.bytes_done == report.input_bytes
    assert {:ok, ^report} = Job.cancel(job)
    Jobs.assert_only(dir, ["out"])
  end

  test "a killed job goes on with a file, and with a stream that is the same", %{dir: dir} do
    source = file!(dir)
    assert {:ok, whole} = Jobs.run(options(dir, "whole", vectors: source))
    assert {:ok, streamed} = Jobs.run(options(dir, "streamed", vectors: many()))

    for {name, vectors, whole_name, report} <- [
          {"file", source, "whole", whole},
          {"stream", many(), "streamed", streamed}
        ] do
      opts = options(dir, name, vectors: vectors)
      interrupt!(opts, 2)
      assert [%{bytes_done: done}] = Job.Unfinished.list(dir)
      assert done == 2 * 1024 * @dimension * 4
      assert {:error, %{reason: {:unfinished, _}}} = Jobs.run(opts)

      {units, result} = Jobs.units_done(fn -> Jobs.run([resume: true] ++ opts) end)
      assert {:ok, %{recall: recall}} = result
      assert length(units) == 4
      assert recall == report.recall
      assert Jobs.digests(Path.join(dir, name)) == Jobs.digests(Path.join(dir, whole_name))
    end

    # What is complete stays as it is.
    {units, result} =
      Jobs.units_done(fn -> Jobs.run([resume: true] ++ options(dir, "file", vectors: source)) end)

    assert {[], {:ok, %{vectors: @count}}} = {units, result}

    assert {:error, %{reason: {:io, %{code: "eexist"}}}} =
             Jobs.run(options(dir, "file", vectors: source))
  end

  test "what is damaged is done again, and another source is refused", %{dir: dir} do
    source = file!(dir)
    assert {:ok, _} = Jobs.run(options(dir, "whole", vectors: source))
    opts = options(dir, "out", vectors: source)
    interrupt!(opts, 3)
    damaged = Path.join(dir, ".out.partial/rescore.safetensors")
    {:ok, file} = :file.open(damaged, [:read, :write, :raw, :binary])
    {:ok, <<byte>>} = :file.pread(file, 2000 * @dimension, 1)
    :ok = :file.pwrite(file, 2000 * @dimension, <<Bitwise.bxor(byte, 1)>>)
    :file.close(file)

    # By what is remembered of its options.
    {:ok, job} = Job.resume(Path.join(dir, "out"), notify: self())
    assert {:ok, _} = Job.await(job)
    assert_received {:viva_tensor_job, ^job, {:redo, %{name: "vectors 1024 to 2047"}}}
    assert Jobs.digests(Path.join(dir, "out")) == Jobs.digests(Path.join(dir, "whole"))

    stream = options(dir, "stream", vectors: many())
    interrupt!(stream, 2)
    assert {:error, %{message: message}} = Job.resume(Path.join(dir, "stream"))
    assert message =~ "has to be given again"
    go_on = fn opts -> Jobs.run([resume: true] ++ Keyword.merge(stream, opts)) end

    other =
      Stream.map(Stream.with_index(many()), fn {v, i} ->
        if i == 1500, do: <<0::32>> <> binary_part(v, 4, byte_size(v) - 4), else: v
      end)

    assert {:error, %{reason: {:changed, _}, message: message}} = go_on.(vectors: other)
    assert message =~ "has other vectors from vector 1024 on"
    assert {:error, %{reason: {:changed, _}}} = go_on.(vectors: many(1024))
    assert {:error, %{reason: {:changed, _}}} = go_on.(codes: :int8)
    assert {:ok, _} = go_on.([])
  end

  test "a worker that dies is started anew where the vectors can be read again", %{dir: dir} do
    source = file!(dir)
    counter = :counters.new(1, [])

    Jobs.at_unit_start(fn _unit ->
      :counters.add(counter, 1, 1)
      if :counters.get(counter, 1) == 3, do: Process.exit(self(), :kill)
    end)

    job = Jobs.start!(options(dir, "out", vectors: source))
    assert {:ok, %{vectors: @count}} = Job.await(job)
    assert_received {:viva_tensor_job, ^job, {:retry, %{attempt: 2, reason: :killed}}}

    stream =
      Stream.map(many(1500), fn v ->
        :counters.add(counter, 1, 1)
        if :counters.get(counter, 1) > 1000, do: raise("it broke"), else: v
      end)

    assert {:error, error} = Jobs.run(options(dir, "stream", vectors: stream))
    assert {:worker_crashed, %{reason: reason}} = error.reason
    assert reason =~ "it broke"
  end

  test "cancelled, it leaves what is done", %{dir: dir} do
    test = self()

    stream =
      Stream.map(Stream.with_index(many()), fn {v, i} ->
        if i == 3000, do: hold(test, v), else: v
      end)

    opts = options(dir, "out", vectors: stream)
    job = Jobs.start!(opts)
    assert_receive :holding
    assert {:ok, %{state: :running, vectors: %{done: 2048}}} = Job.status(job)
    assert {:error, %{reason: {:cancelled, _}}} = Job.cancel(job)
    assert [%{tensors_done: 2, running: false}] = Job.Unfinished.list(dir)
    assert {:ok, _} = Jobs.run([resume: true] ++ Keyword.put(opts, :vectors, many()))
    Jobs.assert_only(dir, ["out"])
  end

  defp hold(test, vector) do
    send(test, :holding)
    Process.sleep(:infinity)
    vector
  end

  test "a bad vector is named by its number", %{dir: dir} do
    good = Made.clustered(20, 8)
    nan = <<0, 0, 0xC0, 0x7F>>

    for {vectors, kind, message} <- [
          {[], :no_vectors, "there are no vectors in the source"},
          {good ++ ["abcd"], :invalid_vector,
           "vector 20 has 4 bytes where 8 elements of f32 have 32"},
          {["abc" | good], :invalid_vector,
           "vector 0 has 3 bytes, and elements of f32 have 4 each"},
          {[""], :invalid_vector, "vector 0 has 0 bytes, and elements of f32 have 4 each"},
          {good ++ [[1.0]], :invalid_vector, "vector 20 is no binary: [1.0]"},
          {good ++ [binary_part(hd(good), 0, 28) <> nan], :non_finite,
           "vector 20 has NaN or infinite elements"}
        ] do
      assert {:error, error} = Jobs.run(options(dir, "out", vectors: vectors))
      assert {:source, {^kind, _}, ^message} = {error.op, error.reason, error.message}
    end

    path = Path.join(dir, "bad.npy")
    Made.npy!(path, good ++ [binary_part(hd(good), 0, 28) <> nan], 8)

    assert {:error, %{reason: {:non_finite, %{vector: 20}}}} =
             Jobs.run(options(dir, "out", vectors: path))

    assert {:error, %{message: message}} =
             Jobs.run(options(dir, "out", vectors: path, dimension: 9))

    assert message =~ "the matrix has 8, and 9 is asked for"
    Made.npy!(path, [], 8)
    assert {:error, %{reason: {:no_vectors, _}}} = Jobs.run(options(dir, "out", vectors: path))
    File.write!(path, "no")

    assert {:error, %{op: :source, reason: {:invalid_file, _}}} =
             Jobs.run(options(dir, "out", vectors: path))

    Jobs.assert_only(dir, ["bad.npy"])
  end

  test "options that make no sense are refused" do
    for {opts, message} <- [
          {[vectors: 5], "vectors: expected a path or a stream of binaries, got 5"},
          {[vectors: [], source: "a"], "is another source"},
          {[vectors: [], codes: :int7], "codes: expected int8, int4, binary, got int7"},
          {[vectors: []], "codes: is required"},
          {[vectors: [], codes: :int8, format: :nf4], "format: no such option"},
          {[vectors: [], codes: :int8, queries: -1], "queries: expected how many"},
          {[vectors: [], codes: :int8, dtype: :i8], "dtype: expected f32"}
        ] do
      assert {:error, error} = Job.start([to: "out"] ++ opts)
      assert error.message =~ message
    end

    assert {:error, error} = Job.enqueue(vectors: [], codes: :int8, to: "out")
    assert error.message =~ "a stream cannot be kept in a queue"
  end

  test "a stream of any length takes the memory of a piece", %{dir: dir} do
    count = 20 * 1024
    opts = options(dir, "out", vectors: many(count), rescore: :none)
    assert {:ok, _} = Jobs.run(options(dir, "first", vectors: many(1024)))
    OSProcess.reset_peak()
    before = OSProcess.status("VmHWM")
    assert {:ok, report} = Jobs.run(opts)
    # Of 335 MB, what a piece of 17 MB and its codes take, and what of it is garbage.
    assert report.input_bytes == count * @dimension * 4
    assert OSProcess.status("VmHWM") - before < 200_000
  end

  # Lets a job record so many pieces, and kills it in the next one.
  defp interrupt!(opts, count) do
    test = self()
    counter = :counters.new(1, [])

    id =
      Jobs.at_unit_start(fn _unit ->
        :counters.add(counter, 1, 1)

        if :counters.get(counter, 1) > count do
          send(test, {:reached, self()})
          Process.sleep(:infinity)
        end
      end)

    job = Jobs.start!(opts)
    assert_receive {:reached, worker}
    # The worker ends with its job.
    monitors = for pid <- [job, worker], do: Process.monitor(pid)
    Process.exit(job, :kill)
    for monitor <- monitors, do: assert_receive({:DOWN, ^monitor, _, _, _})
    # The answer to any call shows that the news has been dealt with.
    :sys.get_state(VivaTensor.Job.Outputs)
    Telemetry.detach(id)
  end
end
