//// Supervised compression, or conversion, of one checkpoint.
////
//// ```gleam
//// let assert Ok(job) =
////   job.start(
////     job.Quantize(format.Nf4, [setting.DoubleQuant(True)]),
////     from: "examples/models/viva-tiny",
////     to: "viva-tiny-nf4",
////     with: [],
////   )
//// let assert Ok(job.Complete(report)) = job.await(job, within: job.Forever)
//// ```
////
//// A job runs under the supervisor of the application and outlives its caller. Its
//// output appears under its name when it is complete and synced; however a job ends,
//// `resume` goes on with what was finished.

import viva_tensor/error.{type Error}
import viva_tensor/format.{type Format}
import viva_tensor/layout.{type Layout}
import viva_tensor/setting.{type Setting}
import viva_tensor/tensor.{type Dtype}

/// A job that was started.
pub type Job

/// What is done to a checkpoint.
pub type Work {
  /// Its weights are quantized.
  Quantize(format: Format, settings: List(Setting))
  /// The same by the name of a recipe, such as `"awq"`; settings go before its own.
  /// `VivaTensor.Recipe.presets/0` lists them.
  Recipe(name: String, settings: List(Setting))
  /// What is quantized already gets another layout.
  Convert(layout: Layout)
}

/// An option of a job.
pub type Option {
  /// How the output is spelled; each format has its usual layout.
  Layout(Layout)
  /// Regular expressions: tensors that are quantized too.
  Include(List(String))
  /// Regular expressions: tensors that are kept.
  Exclude(List(String))
  /// Smaller weights are kept.
  MinElements(Int)
  /// What becomes of weights with NaN or infinities.
  NonFinite(NonFinite)
  /// The file of what layers meet, for methods that look at it.
  Statistics(String)
  /// Of `Convert`: what floats are cast to.
  Dtype(Dtype)
  /// Replace the target if it exists.
  Force(Bool)
  /// Go on with what an earlier job left, or begin.
  Resume(Bool)
  /// Bytes in flight, such as `"512MB"`.
  MemoryLimit(String)
  /// Of the written files, such as `"5GB"`.
  MaxShardSize(String)
  /// Units that run at once on each node.
  MaxConcurrency(Int)
  /// Milliseconds that a unit may take.
  UnitTimeout(Int)
  /// Jobs of a higher one are given memory first.
  Priority(Priority)
  /// Names of Erlang nodes that do units too.
  Nodes(List(String))
}

/// A weight that is not finite is put aside, and the job ends as `Partial`; or it is
/// kept as it is.
pub type NonFinite {
  PutAside
  Keep
}

/// Which jobs are given memory first.
pub type Priority {
  Low
  Normal
  High
}

/// How long to wait.
pub type Wait {
  Forever
  Milliseconds(Int)
}

/// How a job ended. Of a partial one nothing is published, and `resume` tries what was
/// put aside again.
pub type Outcome {
  Complete(Report)
  Partial(Report)
}

/// What a job did. Sizes are counted from the files; `bits_per_weight` and `sqnr_db` are
/// those of all quantized weights together, `lossless` of a conversion those with the
/// same values.
pub type Report {
  Report(
    source: String,
    target: String,
    input_bytes: Int,
    output_bytes: Int,
    ratio: Float,
    quantized: Int,
    kept: Int,
    lossless: Result(Int, Nil),
    bits_per_weight: Result(Float, Nil),
    sqnr_db: Result(Float, Nil),
    seconds: Float,
    tensors: List(Row),
    put_aside: List(Aside),
  )
}

/// One tensor of a report. `reason` says why it was kept or has another format than was
/// asked for; `sqnr_db` is not there where there is no error.
pub type Row {
  Row(
    name: String,
    shape: List(Int),
    dtype: String,
    format: String,
    reason: Result(String, Nil),
    input_bytes: Int,
    output_bytes: Int,
    sqnr_db: Result(Float, Nil),
  )
}

/// A tensor that was put aside, and why the last attempt failed.
pub type Aside {
  Aside(name: String, reason: String, attempts: Int)
}

/// How far a job is.
pub type Status {
  Status(
    state: State,
    tensors: Int,
    tensors_done: Int,
    bytes: Int,
    bytes_done: Int,
    bytes_written: Int,
    running: List(String),
    put_aside: Int,
    seconds: Float,
    bytes_per_second: Float,
    eta_seconds: Result(Float, Nil),
  )
}

/// What a job is at.
pub type State {
  Planning
  /// Choosing the scales of columns.
  Scaling
  Running
  Finishing
  Stopping
  Done
}

/// Starts a job. Options that make no sense are refused here; everything else that may
/// go wrong is the job's result.
@external(erlang, "viva_tensor_gleam_ffi", "start")
pub fn start(
  work: Work,
  from source: String,
  to target: String,
  with options: List(Option),
) -> Result(Job, Error)

/// Starts a job that goes on with what an earlier one left of a target, with its options
/// and those that are given. Fails with `NothingToResume`.
@external(erlang, "viva_tensor_gleam_ffi", "resume")
pub fn resume(target: String, with options: List(Option)) -> Result(Job, Error)

/// How far a job is.
@external(erlang, "viva_tensor_gleam_ffi", "status")
pub fn status(job: Job) -> Result(Status, Error)

/// Waits for the end of a job. After so many milliseconds it fails with `Timeout`, and
/// the job goes on. A finished job answers for ten minutes.
@external(erlang, "viva_tensor_gleam_ffi", "await")
pub fn await(job: Job, within wait: Wait) -> Result(Outcome, Error)

/// Stops a job, which takes no longer than one unit, and returns its result: the error
/// `Cancelled`, or the report of a job that was faster.
@external(erlang, "viva_tensor_gleam_ffi", "cancel")
pub fn cancel(job: Job) -> Result(Outcome, Error)
