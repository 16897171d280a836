//// Why an operation failed.

/// One constructor for each kind of failure. All have `op`, the operation, and
/// `message`, which tells a person what to change; the other fields are to match on.
///
/// ```gleam
/// case viva_tensor.quantize(weight, to: format.Q4K, with: []) {
///   Ok(quantized) -> ...
///   Error(error.Indivisible(row:, block:, ..)) -> ...
///   Error(other) -> panic as other.message
/// }
/// ```
pub type Error {
  UnknownFormat(op: String, message: String, name: String, known: String)
  UnknownLayout(op: String, message: String, name: String, known: String)
  UnknownDtype(op: String, message: String, name: String, known: String)
  UnknownRecipe(op: String, message: String, name: String, known: String)
  /// An option that the format or the operation does not have, or not with this value.
  InvalidOption(op: String, message: String, option: String)
  ShapeMismatch(
    op: String,
    message: String,
    what: String,
    expected: List(Int),
    actual: List(Int),
  )
  SizeMismatch(
    op: String,
    message: String,
    what: String,
    expected: Int,
    actual: Int,
  )
  ShapeOverflow(op: String, message: String, shape: List(Int))
  UnsupportedDtype(op: String, message: String, dtype: String)
  /// Rows of so many elements cannot be cut into blocks of so many.
  Indivisible(op: String, message: String, row: Int, block: Int)
  /// How many NaN and infinities there are.
  NonFinite(op: String, message: String, nan: Int, inf: Int)
  /// A scale that its dtype cannot hold.
  ScaleOverflow(op: String, message: String, dtype: String)
  /// Activations from which no method can tell the columns apart.
  SingularHessian(op: String, message: String)
  /// The tensor was released, and is used again.
  Released(op: String, message: String)
  /// A layout that has no place for the format.
  LayoutMismatch(op: String, message: String, layout: String, format: String)
  InvalidFile(op: String, message: String, path: String)
  InvalidDump(op: String, message: String)
  UnknownTensor(op: String, message: String, name: String)
  /// `code` is the system's: `"enoent"`, `"enospc"`, `"eacces"` …
  Io(op: String, message: String, path: String, code: String)
  Cancelled(op: String, message: String)
  /// Layers of which the statistics say nothing.
  MissingStatistics(op: String, message: String, layers: List(String))
  AlreadyQuantized(op: String, message: String, quant_method: String)
  InvalidVector(op: String, message: String, vector: Int)
  NoVectors(op: String, message: String)
  /// What is not as it was when the unfinished output was begun.
  Changed(op: String, message: String, changes: List(Change))
  /// An earlier job left something: `Resume` goes on with it, `Force` begins again.
  Unfinished(op: String, message: String, path: String)
  NothingToResume(op: String, message: String, path: String)
  WorkerCrashed(
    op: String,
    message: String,
    work: String,
    attempts: Int,
    reason: String,
  )
  /// There is no result yet; the job goes on.
  Timeout(op: String, message: String, milliseconds: Int)
  /// The process of the job is gone.
  NoJob(op: String, message: String, reason: String)
  AnotherNode(op: String, message: String, how: String)
  NoQueue(op: String, message: String)
  MissingLibrary(op: String, message: String, library: String)
  /// A kind that a newer viva_tensor has and this package does not know.
  Other(op: String, message: String, kind: String)
}

/// What changed, and how.
pub type Change {
  Change(what: String, how: String)
}
