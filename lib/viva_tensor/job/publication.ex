defmodule VivaTensor.Job.Publication do
  @moduledoc false
  # The end of a job: shards get their final names, everything around them is
  # written (index, config, tokenizer files, report), and the whole directory
  # appears under its own name.

  alias VivaTensor.{Error, Native, Recipe, Report}
  alias VivaTensor.Job.{FileError, Identity, Ledger, Options, Plan, ReportFiles, Rows}
  alias VivaTensor.Job.{Shard, Tally}

  @config "config.json"
  @index "model.safetensors.index.json"

  @typedoc "What is needed of a job."
  @type job :: %{
          required(:output) => reference,
          required(:options) => Options.t(),
          required(:plan) => Plan.t(),
          required(:identity) => Identity.t(),
          required(:tally) => Tally.t(),
          required(:ledger) => Ledger.t(),
          required(:seconds) => float,
          optional(any) => any
        }

  @doc "Publishes finished shards."
  @spec publish(job) :: {:ok, Report.t()} | {:error, Error.t()}
  def publish(%{output: output, plan: plan} = job) do
    shards = Tally.in_order(job.tally)
    names = Shard.final_names(plan.file, length(shards))
    units = Enum.flat_map(shards, & &1.units)
    written = for {shard, name} <- Enum.zip(shards, names), do: put_elem(shard.written, 0, name)
    files = for {name, bytes, _} <- written, do: %{name: name, bytes: bytes}
    named = for {shard, name} <- Enum.zip(shards, names), do: {Shard.file(shard), name}

    with {:ok, fields} <- fields(job, units, files),
         {:ok, ledger} <- record(job.ledger, {:named, named}, output),
         :ok <- rename(shards, names, output),
         :ok <- write_index(output, written),
         {:ok, written_already} <- write_config(output, plan, units),
         :ok <- carry_companions(output, plan, written_already),
         {:ok, report} <- write_report(output, job.options, fields),
         {:ok, _ledger} <- record(ledger, {:published, Map.delete(fields, :tensors)}, output),
         {:ok, _path} <- output |> Native.output_commit() |> Error.wrap(:output) do
      {:ok, report}
    end
  end

  @doc """
  Leaves an output unpublished, of which some units were put aside. Its report is in
  the hidden directory.
  """
  @spec put_aside(job) :: {:ok, Report.t()} | {:error, Error.t()}
  def put_aside(%{output: output} = job) do
    units = job.tally |> Tally.in_order() |> Enum.flat_map(& &1.units)

    with {:ok, fields} <- fields(job, units, []),
         {:ok, report} <- write_report(output, job.options, fields) do
      Native.output_release(output)
      {:ok, report}
    end
  end

  @doc "Ends what a job began that was interrupted after its output appeared."
  @spec clean_up(reference, Options.t(), map) :: {:ok, Report.t()} | {:error, Error.t()}
  def clean_up(output, options, fields) do
    with {:ok, _path} <- output |> Native.output_commit() |> Error.wrap(:output) do
      {:ok, report(options, fields)}
    end
  end

  @doc "The report of an output that is there already, if it is of the same job."
  @spec published(Options.t(), Identity.t()) :: {:ok, Report.t()} | :error
  def published(options, identity) do
    digest = Identity.digest(identity)

    with {:ok, json} <- options.to |> Path.join(ReportFiles.json()) |> File.read(),
         {:ok, %{"identity" => ^digest} = map} <- Native.json_decode(json) do
      {:ok, Report.from_map(map, options.recipe)}
    else
      _ -> :error
    end
  end

  defp fields(job, units, files) do
    with {:ok, rows} <- rows(job, units) do
      {:ok,
       %{
         identity: Identity.digest(job.identity),
         statistics: job.plan.statistics,
         tensors: rows,
         quarantined: Tally.quarantined(job.tally),
         files: files,
         input_bytes: job.plan.bytes_on_disk,
         seconds: job.seconds
       }}
    end
  end

  # A job that has nothing to record has no manifest.
  defp rows(%{ledger: %{at: 0}}, _units), do: {:ok, []}

  defp rows(job, units) do
    with {:ok, {_found, manifest}} <- job.output |> Native.output_found() |> Error.wrap(:output),
         do: Rows.read(manifest, units)
  end

  defp write_report(output, options, fields) do
    report = report(options, fields)

    with :ok <- ReportFiles.write(output, Report.to_map(report)), do: {:ok, report}
  end

  defp report(options, fields) do
    fields
    |> Map.merge(%{source: options.source, target: options.to, recipe: options.recipe})
    |> Report.new()
  end

  defp record(ledger, record, output) do
    {{shards, at, bytes}, ledger} = ledger |> Ledger.add(record) |> Ledger.next()

    with {:ok, _} <- output |> Native.output_record(shards, at, bytes) |> Error.wrap(:output) do
      {_records, ledger} = Ledger.written(ledger)
      {:ok, ledger}
    end
  end

  defp rename(shards, names, output) do
    with {:ok, directory} <- output |> Native.output_path() |> Error.wrap(:output) do
      each(Enum.zip(shards, names), fn {s, name} -> Shard.rename(s, directory, name) end)
    end
  end

  defp write_index(_output, [_only]), do: :ok

  defp write_index(output, written) do
    with {:ok, json} <- written |> Native.shard_index() |> Error.wrap(:output),
         {:ok, _} <- write(output, @index, json),
         do: :ok
  end

  # Writes what says how to load the weights; returns the names of files that are
  # then not to be taken from the source. A file that holds a whole model says that
  # itself.
  defp write_config(_output, %{file: file}, _units) when file != nil, do: {:ok, []}

  defp write_config(output, %{work: {:convert, conversion}} = plan, units) do
    with {:ok, {files, stale}} <-
           conversion
           |> Native.conversion_files(plan.checkpoint.ref, kept_modules(units))
           |> Error.wrap(:source),
         :ok <- write_all(output, files) do
      {:ok, stale ++ Enum.map(files, &elem(&1, 0))}
    end
  end

  # Without config.json the source is bare weights, and nothing says how to load them.
  defp write_config(output, %{work: {:quantize, spec, _observed}} = plan, units) do
    config = Enum.find(plan.checkpoint.companions, &(&1.relative == @config))

    if config != nil and Enum.any?(units, & &1.quantized) do
      with {:ok, source} <- config.file |> File.read() |> FileError.wrap(:source, config.file),
           {:ok, files} <-
             spec |> Native.config_files(source, kept_modules(units)) |> Error.wrap(:source),
           :ok <- write_all(output, files) do
        {:ok, Enum.map(files, &elem(&1, 0))}
      end
    else
      {:ok, []}
    end
  end

  defp write_all(output, files) do
    each(files, fn {name, text} ->
      with {:ok, _} <- write(output, name, text), do: :ok
    end)
  end

  defp kept_modules(units) do
    Recipe.kept_modules(
      for unit <- units do
        {unit, if(unit.quantized, do: :quantize, else: {:keep, unit.reason})}
      end
    )
  end

  defp carry_companions(_output, %{file: file}, _but) when file != nil, do: :ok

  # A report in the source is of another job.
  defp carry_companions(output, plan, but) do
    plan.checkpoint.companions
    |> Enum.reject(&(&1.relative in (ReportFiles.names() ++ but)))
    |> each(&carry(output, &1))
  end

  defp carry(output, %{file: file, relative: relative}) do
    with {:ok, _} <- output |> Native.output_carry(file, relative) |> Error.wrap(:output),
         do: :ok
  end

  defp write(output, relative, content) do
    output |> Native.output_write(relative, content) |> Error.wrap(:output)
  end

  defp each(items, fun) do
    Enum.reduce_while(items, :ok, fn item, :ok ->
      case fun.(item) do
        :ok -> {:cont, :ok}
        error -> {:halt, error}
      end
    end)
  end
end
