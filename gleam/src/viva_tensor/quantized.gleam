//// Quantized tensors: codes and scales in native memory.

import viva_tensor/error.{type Error}
import viva_tensor/format.{type Format}
import viva_tensor/tensor.{type Dtype}

/// Codes and scales of a tensor, made by `viva_tensor.quantize` or read by
/// `checkpoint.get`.
pub type Quantized

/// Its format.
@external(erlang, "viva_tensor_gleam_ffi", "quantized_format")
pub fn format(quantized: Quantized) -> Format

/// The shape of the tensor that it stands for.
@external(erlang, "viva_tensor_gleam_ffi", "shape")
pub fn shape(quantized: Quantized) -> List(Int)

/// What it was quantized from.
@external(erlang, "viva_tensor_gleam_ffi", "dtype")
pub fn dtype(quantized: Quantized) -> Dtype

/// Bytes of codes, scales and zero points.
@external(erlang, "viva_tensor_gleam_ffi", "nbytes")
pub fn nbytes(quantized: Quantized) -> Int

/// The same, in bits for each element.
@external(erlang, "viva_tensor_gleam_ffi", "bits_per_weight")
pub fn bits_per_weight(quantized: Quantized) -> Float

/// Bits that hold everything, for another process, node or store.
@external(erlang, "viva_tensor_gleam_ffi", "dump")
pub fn dump(quantized: Quantized) -> Result(BitArray, Error)

/// What `dump` wrote; the bits are read in place. Fails with `InvalidDump` for anything
/// else, however it is damaged.
@external(erlang, "viva_tensor_gleam_ffi", "load")
pub fn load(bits: BitArray) -> Result(Quantized, Error)

/// Gives up the memory now instead of when it is garbage collected. Later calls fail
/// with `Released`.
@external(erlang, "viva_tensor_gleam_ffi", "release")
pub fn release(quantized: Quantized) -> Nil
