defmodule VivaTensor.Job.Vectors.Worker do
  @moduledoc false
  # The work of a job that compresses vectors: each piece is encoded, written, synced and
  # recorded before the next one is begun, and in the end the output appears.
  #
  # A record is like that of a checkpoint's unit. What an earlier job recorded counts if
  # what it wrote is there, and for a stream, or a file that was touched, if its vectors are
  # the same too.

  alias VivaTensor.{Error, Native, Telemetry}
  alias VivaTensor.Job.{Admission, Identity, Manifest, Options, ReportFiles, Unit, Vectors}
  alias VivaTensor.Job.Vectors.{Left, Source}
  alias VivaTensor.Vectors.{Recipe, Report}

  # What encoding takes for each element, beside the element.
  @element_bytes 16

  @typedoc "The job, the flag of its native calls, which attempt it is and when the job began."
  @type run :: %{job: pid, cancel: reference, attempt: pos_integer, started: integer}

  @doc "Does all of it, in the calling process."
  @spec run(Options.t(), run) :: {:ok, Report.t()} | {:error, Error.t()}
  def run(options, run) do
    with {:ok, source} <- Source.open(options),
         {:ok, source, set} <- Source.reduce(source, nil, &piece(&1, &2, &3, options, run)) do
      finish(set, source, options, run)
    else
      # It was all there, or only cleaning up was left to do.
      {:complete, report} -> {:ok, report}
      {:error, error} -> {:error, error}
    end
  end

  # The first piece tells what there is to begin with.
  defp piece(source, piece, nil, options, run) do
    with {:ok, set} <- begin(source, piece, options, run),
         do: piece(source, piece, set, options, run)
  end

  defp piece(source, {first, count, _vectors} = piece, set, options, run) do
    unit = %Unit{
      id: first,
      name: "vectors #{first} to #{first + count - 1}",
      shape: [count, source.dimension],
      dtype: to_string(source.dtype),
      action: :encode,
      format: options.recipe.codes,
      input_bytes: count * Source.vector_bytes(source),
      output_bytes: 0,
      working_bytes: @element_bytes * count * source.dimension
    }

    admitted(Unit.bytes(unit), options, run, fn ->
      case Left.look(set.left, set.writer, piece, run.cancel) do
        {:ok, row} ->
          Vectors.tell(run.job, {:done, row, :verified})
          {:ok, set}

        {:redo, row} ->
          Vectors.tell(run.job, {:redo, row})
          encode(unit, piece, set, run)

        :nothing ->
          encode(unit, piece, set, run)

        {:error, error} ->
          {:error, error}
      end
    end)
  end

  defp admitted(bytes, options, run, fun) do
    %{memory_limit: limit, priority: priority} = options
    ticket = Admission.request(bytes, limit, run.cancel, priority)
    receive do: ({:admitted, ^ticket} -> :ok)
    result = fun.()
    Admission.release(ticket)
    result
  end

  # The beginning

  defp begin(source, piece, options, run) do
    with {:ok, {sample, ids}} <- Source.sample(source, piece),
         {:ok, identity} <- Identity.of_vectors(options, source),
         {:ok, output, found} <- open(source, identity, options, run),
         {:ok, left} <- Left.read(found, identity, source, options) do
      create(%{output: output, identity: identity, left: left}, sample, ids, source, options)
    end
  end

  defp open(source, identity, options, run) do
    facts = %{
      protected: source.files,
      pieces: Source.pieces(source),
      bytes: source.bytes,
      vectors: source.count
    }

    case Vectors.begin(run.job, facts) do
      # Going on with what is complete changes nothing.
      {:error, %Error{reason: {:io, %{code: "eexist"}}} = error} when options.resume ->
        published(options, identity, error)

      other ->
        other
    end
  end

  defp published(options, identity, error) do
    digest = Identity.digest(identity)

    with {:ok, json} <- options.to |> Path.join(ReportFiles.json()) |> File.read(),
         {:ok, %{"identity" => ^digest} = map} when identity.files != %{} <-
           Native.json_decode(json) do
      {:complete, Report.from_map(map, options.recipe)}
    else
      _ -> {:error, error}
    end
  end

  defp create(%{left: %{published: %{} = fields}} = set, _sample, _ids, _source, options) do
    with {:ok, _path} <- set.output |> Native.output_commit() |> Error.wrap(:output),
         do: {:complete, report(options, fields)}
  end

  defp create(set, sample, ids, source, options) do
    settings = Recipe.settings(options.recipe)
    queries = options.recipe.queries

    case Native.vectors_create(set.output, settings, sample, ids, queries, source.count) do
      {:ok, writer} ->
        {:ok, Map.merge(set, %{writer: writer, at: set.left.at, head: set.left.head})}

      {:error, {:non_finite, %{first: element}, _message} = reason} ->
        {:error, about(reason, Enum.at(ids, div(element, source.dimension)))}

      {:error, {kind, _details, _message} = reason} ->
        Error.wrap({:error, reason}, if(kind == :io, do: :output, else: :source))
    end
  end

  # A piece

  defp encode(unit, {first, count, vectors}, set, run) do
    Vectors.tell(run.job, {:piece, unit})
    metadata = %{job: run.job, name: unit.name, action: :encode, attempt: run.attempt}
    began = System.monotonic_time()
    time = %{system_time: System.system_time()}
    Telemetry.execute([:viva_tensor, :unit, :start], time, metadata)

    with {:ok, {output_bytes, _, _, _} = written} <-
           Native.vectors_write(set.writer, first, vectors.ref, run.cancel),
         row = row(unit, count, output_bytes),
         record = %{row: row, count: count, written: written},
         {:ok, set} <- record({:unit, [first], unit.name, record}, set) do
      duration = System.monotonic_time() - began

      measurements = %{
        input_bytes: unit.input_bytes,
        output_bytes: output_bytes,
        duration: duration
      }

      Telemetry.execute([:viva_tensor, :unit, :stop], measurements, metadata)
      Vectors.tell(run.job, {:done, row, :written})
      {:ok, set}
    else
      {:error, reason} ->
        error = about(reason, first, vectors)
        duration = System.monotonic_time() - began
        metadata = Map.put(metadata, :error, error)
        Telemetry.execute([:viva_tensor, :unit, :exception], %{duration: duration}, metadata)
        {:error, error}
    end
  end

  defp row(unit, count, output_bytes) do
    unit
    |> Map.take([:name, :shape, :dtype, :action, :format, :reason, :input_bytes])
    |> Map.merge(%{
      vectors: count,
      elements: Enum.product(unit.shape),
      output_bytes: output_bytes
    })
  end

  defp about({:non_finite, %{first: element}, _message} = reason, first, vectors),
    do: about(reason, first + div(element, List.last(vectors.shape)))

  defp about({kind, details, message}, _first, _vectors),
    do: Error.new(:unit, {kind, details}, message)

  defp about(%Error{} = error, _first, _vectors), do: error

  defp about({:non_finite, details, _message}, vector) do
    reason = {:non_finite, Map.put(details, :vector, vector)}
    Error.new(:source, reason, "vector #{vector} has NaN or infinite elements")
  end

  # Made durable after what it speaks of.
  defp record(record, set) do
    bytes = IO.iodata_to_binary(Manifest.encode(set.head ++ [record]))
    bytes = if set.at == 0, do: Manifest.head() <> bytes, else: bytes

    with {:ok, _} <- set.writer |> Native.vectors_sync() |> Error.wrap(:output),
         {:ok, _} <-
           set.output |> Native.output_record([], set.at, bytes) |> Error.wrap(:output) do
      {:ok, %{set | at: set.at + byte_size(bytes), head: []}}
    end
  end

  # The end

  defp finish(nil, _source, _options, _run) do
    {:error, Error.new(:source, {:no_vectors, %{}}, "there are no vectors in the source")}
  end

  defp finish(set, source, options, run) do
    Vectors.tell(run.job, :finishing)
    oversample = options.recipe.oversample

    with :ok <- Left.within(set.left, source.count),
         :ok <- Identity.same_files(set.identity, source.files),
         {:ok, files} <- set.writer |> Native.vectors_finish(source.count) |> Error.wrap(:output),
         {:ok, recall} <-
           set.writer |> Native.vectors_recall(oversample, run.cancel) |> Error.wrap(:output),
         fields = fields(set, source, files, recall, run),
         report = report(options, fields),
         :ok <- ReportFiles.write(set.output, Report.to_map(report)),
         {:ok, set} <- record({:published, fields}, set),
         {:ok, _path} <- set.output |> Native.output_commit() |> Error.wrap(:output) do
      {:ok, report}
    end
  end

  defp fields(set, source, files, recall, run) do
    %{
      identity: Identity.digest(set.identity),
      vectors: source.count,
      dimension: source.dimension,
      dtype: source.dtype,
      files: for({name, bytes} <- files, do: %{name: name, bytes: bytes}),
      input_bytes: source.count * Source.vector_bytes(source),
      recall: recall,
      seconds: Vectors.seconds_since(run.started)
    }
  end

  defp report(options, fields) do
    fields
    |> Map.merge(%{source: options.source, target: options.to, recipe: options.recipe})
    |> Report.new()
  end
end
