defmodule VivaTensor.Job do
  @moduledoc """
  One supervised compression, or conversion, of one checkpoint.

      {:ok, job} =
        VivaTensor.Job.start(
          source: "examples/models/viva-tiny",
          to: "viva-tiny-nf4",
          format: :nf4,
          double_quant: true
        )

      {:ok, report} = VivaTensor.Job.await(job)
      report |> VivaTensor.Report.table() |> IO.puts()

  With `convert:` it gives a quantized checkpoint another layout:

      VivaTensor.Job.start(source: "viva-tiny-nf4", to: "viva-tiny-bf16", convert: :plain)

  A job decides for every tensor whether it is quantized or kept
  (`VivaTensor.Recipe`), or what it is converted to (`VivaTensor.Conversion`), runs
  one unit for each tensor in a worker process of its
  own, and writes a directory that appears under its name only when it is complete
  and synced. A worker that dies is replaced; a failed or cancelled job leaves
  nothing behind; so does one that is killed.

  ## Messages

  With `notify: pid`, that process receives `{:viva_tensor_job, job, event}`:

  - `{:planned, %{tensors: n, bytes: n}}`
  - `{:unit, row}` for each finished unit, see `t:VivaTensor.Report.row/0`
  - `{:kept, %{name: name, reason: reason}}` for a weight with NaN or infinities,
    under `non_finite: :keep`
  - `{:retry, %{work: what, attempt: n, reason: reason}}` after a worker died
  - `{:state, :stopping}`
  - `{:done, {:ok, report} | {:error, error}}`

  `VivaTensor.Telemetry` has the same story as telemetry events.
  """

  alias VivaTensor.{Error, Report}
  alias VivaTensor.Job.{Machine, Options, Status}

  @type job :: pid
  @type result :: {:ok, Report.t()} | {:error, Error.t()}

  @doc """
  Starts a job under the application's supervisor. It outlives the caller.

  - `:source` - a `.safetensors` or `.gguf` file, a sharded directory with its index, or a
    Hugging Face model directory; required
  - `:to` - the directory to write; required
  - `:force` - replace `:to` if it exists (`false`)
  - `:memory_limit` - bytes in flight over the units that run at once, input and
    output counted (`"512MB"`); a larger unit runs alone
  - `:max_concurrency` - units that run at once (one for each online scheduler)
  - `:max_shard_size` - of the files of the output (`"5GB"`); the gguf layout has
    one file
  - `:notify` - a process to keep informed, see above
  - `:recipe` - a `VivaTensor.Recipe`, the name of one with more of its options beside
    it, or a `VivaTensor.Conversion`; without it, all options of a recipe: see
    `VivaTensor.Recipe.new/2`
  - `:statistics` - for methods that look at activations: what the layers of this model
    meet, in a `VivaTensor.Calibration` or the file of one. Every weight that is
    quantized needs an entry. It may go beside a `VivaTensor.Recipe` too
  - `:convert` - the layout of a conversion, with `:dtype` if floats are to be cast:
    see `VivaTensor.Conversion.new/1`

  Sizes are numbers of bytes or strings such as `"2GB"`. Options that make no
  sense are refused here; everything else that may go wrong is the job's result.
  """
  @spec start(keyword) :: {:ok, job} | {:error, Error.t()}
  def start(opts) do
    with {:ok, options} <- Options.new(opts) do
      DynamicSupervisor.start_child(VivaTensor.Job.Supervisor, {__MODULE__, options})
    end
  end

  @doc """
  Starts a job linked to the caller: it ends, and its output goes, when the caller
  exits. Takes the options of `start/1`.
  """
  @spec start_link(keyword | Options.t()) :: {:ok, job} | {:error, Error.t()}
  def start_link(%Options{} = options), do: :gen_statem.start_link(Machine, options, [])

  def start_link(opts) do
    with {:ok, options} <- Options.new(opts), do: start_link(options)
  end

  @doc false
  def child_spec(options) do
    %{
      id: __MODULE__,
      start: {__MODULE__, :start_link, [options]},
      restart: :temporary
    }
  end

  @doc "How far a job is."
  @spec status(job) :: {:ok, Status.t()} | {:error, Error.t()}
  def status(job) do
    with status when is_map(status) <- call(job, :status, :infinity), do: {:ok, status}
  end

  @doc """
  Waits for the result of a job.

  After `timeout` milliseconds the error's reason is `:timeout`, and the job goes
  on. A finished job answers for ten minutes.
  """
  @spec await(job, timeout) :: result
  def await(job, timeout \\ :infinity), do: call(job, :await, timeout)

  @doc """
  Stops a job and removes what it wrote. Returns its result once it has stopped,
  which takes no longer than one unit: an error whose reason is `:cancelled`, or
  the report of a job that was faster.
  """
  @spec cancel(job) :: result
  def cancel(job), do: call(job, :cancel, :infinity)

  defp call(job, request, timeout) do
    :gen_statem.call(job, request, timeout)
  catch
    :exit, {:timeout, _} ->
      {:error,
       Error.new(
         :job,
         {:timeout, %{milliseconds: timeout}},
         "no result after #{timeout} ms; the job goes on"
       )}

    :exit, {reason, _} ->
      {:error, gone(reason)}
  end

  @doc "The error of a job whose process ended before it had a result."
  @spec gone(term) :: Error.t()
  def gone(reason) do
    reason = inspect(reason)
    Error.new(:job, {:no_job, %{reason: reason}}, "the job is gone: #{reason}")
  end
end
