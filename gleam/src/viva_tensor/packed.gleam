//// Quantized matrices rearranged for this machine's kernels.

import viva_tensor/format.{type Format}

/// Made by `viva_tensor.prepack` and multiplied with by `viva_tensor.matmul_packed`. It
/// is never written to a file, and is no way back to the weights.
pub type Packed

/// The format that it was made of.
@external(erlang, "viva_tensor_gleam_ffi", "quantized_format")
pub fn format(packed: Packed) -> Format

/// The shape of the matrix.
@external(erlang, "viva_tensor_gleam_ffi", "shape")
pub fn shape(packed: Packed) -> List(Int)

/// Bytes of native memory.
@external(erlang, "viva_tensor_gleam_ffi", "nbytes")
pub fn nbytes(packed: Packed) -> Int

/// Gives up the memory now instead of when it is garbage collected. Later calls fail
/// with `Released`.
@external(erlang, "viva_tensor_gleam_ffi", "release")
pub fn release(packed: Packed) -> Nil
