//// Files of tensors: a `.safetensors` or `.gguf` file, a sharded directory with its
//// index, or a Hugging Face model directory.

import viva_tensor/error.{type Error}
import viva_tensor/quantized.{type Quantized}
import viva_tensor/tensor.{type Tensor}

/// A checkpoint on disk, mapped. Its files must not change while they are.
pub type Checkpoint

/// What a checkpoint has under a name.
pub type Found {
  Dense(Tensor)
  Compressed(Quantized)
}

/// A tensor as a person counts them: the parts of one quantized weight are one.
pub type Content {
  Content(
    name: String,
    /// A format, or the dtype of what is not quantized: files know more of them than
    /// this package.
    format: String,
    /// How it is spelled, where it is quantized.
    layout: Result(String, Nil),
    shape: List(Int),
    nbytes: Int,
    bits_per_weight: Result(Float, Nil),
    /// The names of the parts in the file.
    tensors: List(String),
  )
}

/// Opens and validates a checkpoint; headers alone are read.
///
/// Fails with `Io` when it cannot be read, with `InvalidFile` when it is not what it
/// claims to be.
@external(erlang, "viva_tensor_gleam_ffi", "open")
pub fn open(path: String) -> Result(Checkpoint, Error)

/// What the checkpoint holds.
@external(erlang, "viva_tensor_gleam_ffi", "contents")
pub fn contents(checkpoint: Checkpoint) -> Result(List(Content), Error)

/// One tensor by name, read in place when it is used. Fails with `UnknownTensor`, whose
/// message has the name that was perhaps meant.
@external(erlang, "viva_tensor_gleam_ffi", "get")
pub fn get(checkpoint: Checkpoint, name name: String) -> Result(Found, Error)

/// Bytes of all tensors.
@external(erlang, "viva_tensor_gleam_ffi", "total_bytes")
pub fn total_bytes(checkpoint: Checkpoint) -> Int

/// Unmaps the files once the last tensor read from them is gone.
@external(erlang, "viva_tensor_gleam_ffi", "release")
pub fn release(checkpoint: Checkpoint) -> Nil
