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

  With `vectors:` it takes embedding vectors, as many as there are, and writes codes to
  search in (`VivaTensor.Vectors`):

      VivaTensor.Job.start(vectors: "embeddings.npy", to: "embeddings-int8", codes: :int8)

  A job decides for every tensor whether it is quantized or kept
  (`VivaTensor.Recipe`), or what it is converted to (`VivaTensor.Conversion`), runs
  one unit for each tensor in a worker process of its
  own, and writes a directory that appears under its name only when it is complete
  and synced.

  ## Nothing is lost

  Until then it is filled under a hidden name beside it, `.NAME.partial`, where a
  manifest says which units are done: each with hashes of what it was made from and of
  its bytes, once these are synced. However a job ends, cancelled, killed, with the
  whole machine or for want of space, `resume/1` goes on with what is there, does again
  what is not as it was recorded, and ends with the bytes of a job that nothing
  interrupted.

  A unit whose worker dies, that takes too long, or whose tensor cannot be done, a
  weight with NaN for example, is tried again and then put aside: the job goes on and
  ends as `{:partial, report}`. The report names the tensor and the reason. Nothing is
  published then, and `resume/1` tries those units alone.

  ## Messages

  With `notify: pid`, or after `subscribe/1`, a process receives
  `{:viva_tensor_job, job, event}`:

  - `{:planned, %{tensors: n, bytes: n}}`
  - `{:unit, row}` for each finished unit, see `t:VivaTensor.Report.row/0`; of vectors it
    has the `name`, `vectors`, `input_bytes` and `output_bytes` of a piece
  - `{:kept, %{name: name, reason: reason}}` for a weight with NaN or infinities,
    under `non_finite: :keep`
  - `{:retry, %{work: what, attempt: n, reason: reason}}` after a worker died, took too
    long (`{:timeout, ms}`) or returned an error
  - `{:quarantined, %{name: name, reason: text, attempts: n}}`
  - `{:redo, %{name: name}}` for a unit of an earlier job that is not as it was recorded
  - `{:node, %{node: node, state: state, reason: text}}` when another node has `:joined`,
    was `:lost`, is `:silent`, since it does not answer, or `:refused`, for what it sees is
    not what the job sees
  - `{:state, :stopping}`
  - `{:done, result}`, as `await/2` returns it

  `VivaTensor.Telemetry` has the same story as telemetry events.
  """

  alias VivaTensor.{Error, Report}
  alias VivaTensor.Job.{Machine, Options, Queue, Status, Unfinished, Vectors}
  alias VivaTensor.Vectors.Recipe

  @type job :: pid
  @type result ::
          {:ok, Report.t() | VivaTensor.Vectors.Report.t()}
          | {:partial, Report.t()}
          | {:error, Error.t()}

  @doc """
  Starts a job under the application's supervisor. It outlives the caller.

  - `:source` - a `.safetensors` or `.gguf` file, a sharded directory with its index, or a
    Hugging Face model directory; required
  - `:to` - the directory to write; required
  - `:force` - replace `:to` if it exists and, without `:resume`, forget what an earlier
    job left (`false`)
  - `:resume` - go on with what an earlier job left of the same source and recipe, if
    there is any (`false`); see `resume/2`
  - `:memory_limit` - bytes in flight over the units that run at once, input and
    output counted (`"512MB"`); a larger unit runs alone
  - `:max_concurrency` - units that run at once on each node (one for each online scheduler)
  - `:max_shard_size` - of the files of the output (`"5GB"`); the gguf layout has
    one file
  - `:unit_timeout` - milliseconds that a unit may take, or `:infinity` (an hour)
  - `:priority` - `:low`, `:normal` or `:high`: jobs of a higher one are given memory first,
    those of the same share it (`:normal`)
  - `:nodes` - names of Erlang nodes that do units too, or `:connected` for all that are
    connected, now or later. They need this version of viva_tensor and the same storage
    under the same paths; tensors are never sent. One that is lost gives its units to the
    others, and one that comes up, or comes back, gets some (`[]`)
  - `:notify` - a process to keep informed, see above
  - `:recipe` - a `VivaTensor.Recipe`, the name of one with more of its options beside
    it, or a `VivaTensor.Conversion`; without it, all options of a recipe: see
    `VivaTensor.Recipe.new/2`
  - `:statistics` - for methods that look at activations: what the layers of this model
    meet, in a `VivaTensor.Calibration` or the file of one. Every weight that is
    quantized needs an entry. It may go beside a `VivaTensor.Recipe` too
  - `:vectors` - instead of `:source`: a `.npy` file, one of tensors, or an `Enumerable` of
    binaries, a vector each. The recipe is then a `VivaTensor.Vectors.Recipe`, or its
    options, and the report a `VivaTensor.Vectors.Report`. Vectors are done piece by piece:
    `:max_concurrency`, `:max_shard_size` and `:unit_timeout` mean nothing to them. What
    was begun with a stream can be gone on with if it is given again: what is recorded
    counts where its vectors are the same
  - `:convert` - the layout of a conversion, with `:dtype` if floats are to be cast:
    see `VivaTensor.Conversion.new/1`

  Sizes are numbers of bytes or strings such as `"2GB"`. Options that make no
  sense are refused here; everything else that may go wrong is the job's result.
  """
  @spec start(keyword) :: {:ok, job} | {:error, Error.t()}
  def start(opts) do
    with {:ok, options} <- Options.new(opts) do
      child = %{child_spec(opts) | start: {__MODULE__, :start_checked, [options]}}
      DynamicSupervisor.start_child(VivaTensor.Job.Supervisor, child)
    end
  end

  @doc """
  Starts a job that goes on with what an earlier one left of `to`, with its options
  and those that are given: the ways in which it runs may be others, and
  `non_finite: :keep` may be given for weights that were put aside. Statistics that
  were in memory have to be given again.

  What is there is verified first, and what is not as it was recorded is done again. A
  source or recipe that is not what it was is refused: the error's reason is
  `{:changed, %{changes: …}}`.
  """
  @spec resume(Path.t(), keyword) :: {:ok, job} | {:error, Error.t()}
  def resume(to, opts \\ []) do
    with {:ok, unfinished} <- Unfinished.of(to) do
      unfinished |> Unfinished.options(opts) |> start()
    end
  end

  @doc """
  Starts a job linked to the caller: it ends when the caller exits. Takes the options of `start/1`.
  """
  @spec start_link(keyword) :: {:ok, job} | {:error, Error.t()}
  def start_link(opts) do
    with {:ok, options} <- Options.new(opts), do: start_checked(options)
  end

  @doc false
  @spec start_checked(Options.t()) :: {:ok, job}
  def start_checked(%Options{recipe: %Recipe{}} = options),
    do: :gen_statem.start_link(Vectors, options, [])

  def start_checked(options), do: :gen_statem.start_link(Machine, options, [])

  @doc false
  def child_spec(opts) do
    %{
      id: __MODULE__,
      start: {__MODULE__, :start_link, [opts]},
      restart: :temporary
    }
  end

  @doc """
  Adds a job to the queue of the application, which starts it in its turn, also when the
  node was restarted before: see `VivaTensor.Job.Queue`. Takes the options of `start/1`,
  without statistics in memory.
  """
  @spec enqueue(keyword) :: {:ok, id :: pos_integer} | {:error, Error.t()}
  def enqueue(opts), do: Queue.add(opts)

  @doc """
  Has the calling process informed of what happens from now on, as `notify:` does from the
  start. Returns how far the job is.
  """
  @spec subscribe(job) :: {:ok, Status.t()} | {:error, Error.t()}
  def subscribe(job) do
    with status when is_map(status) <- call(job, :subscribe, :infinity), do: {:ok, status}
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
  Stops a job. Returns its result once it has stopped, which takes no longer than one
  unit: an error whose reason is `:cancelled`, or the report of a job that was faster.
  What is finished stays for `resume/2`.
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

  @doc false
  # The error of a job whose process ended before it had a result.
  @spec gone(term) :: Error.t()
  def gone(reason) do
    reason = inspect(reason)
    Error.new(:job, {:no_job, %{reason: reason}}, "the job is gone: #{reason}")
  end
end
