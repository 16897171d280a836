//// Quantization for the BEAM: shrink weights 4–8×, multiply with the shrunken weights
//// directly, compress whole checkpoints in supervised jobs.
////
//// ```gleam
//// let assert Ok(weight) =
////   tensor.from_list([0.5, -1.0, 0.25, 1.0], dtype: tensor.F32, shape: [2, 2])
//// let assert Ok(q) = viva_tensor.quantize(weight, to: format.Int8, with: [])
//// let assert Ok(x) = tensor.from_list([1.0, 2.0], dtype: tensor.F32, shape: [1, 2])
//// let assert Ok(y) = viva_tensor.matmul(x, by: q, with: [])
//// ```
////
//// Every function that can fail returns a `Result` with an `error.Error`. The Mix
//// application `viva_tensor` does the work; it must be on the code path, and is started
//// with this package.

import viva_tensor/error.{type Error}
import viva_tensor/format.{type Format}
import viva_tensor/number.{type Number}
import viva_tensor/packed.{type Packed}
import viva_tensor/quantized.{type Quantized}
import viva_tensor/setting.{type Setting}
import viva_tensor/tensor.{type Dtype, type Tensor}

/// Quantizes a float tensor.
///
/// Fails with `InvalidOption` for a setting that the format does not have, with
/// `Indivisible` when no block fits the rows, with `NonFinite` when the tensor holds a
/// NaN or an infinity, with `UnsupportedDtype` for integers.
///
/// ```gleam
/// viva_tensor.quantize(weight, to: format.Nf4, with: [
///   setting.BlockSize(64),
///   setting.DoubleQuant(True),
/// ])
/// ```
@external(erlang, "viva_tensor_gleam_ffi", "quantize")
pub fn quantize(
  tensor: Tensor,
  to format: Format,
  with settings: List(Setting),
) -> Result(Quantized, Error)

/// The values of a quantized tensor, each computed in f32 and rounded once.
@external(erlang, "viva_tensor_gleam_ffi", "dequantize")
pub fn dequantize(
  quantized: Quantized,
  to dtype: Dtype,
) -> Result(Tensor, Error)

/// An option of a product.
pub type MatmulOption {
  /// The dtype of the result; that of x, if not given.
  Dtype(Dtype)
  /// The arithmetic; `F32`, if not given.
  Compute(Compute)
  /// A tensor `[n]` that is added to every row of the result.
  Bias(Tensor)
  /// A tensor of the result's shape that is added to it.
  Residual(Tensor)
}

/// The arithmetic of a product; how exact each is, is in the documentation of
/// `VivaTensor.matmul/3`.
pub type Compute {
  F32
  Bf16
  /// Rows of x in 8 bits too, integer sums.
  Int8
  /// LLM.int8(), for symmetric `Int8` with one scale a row.
  LlmInt8
  /// What the format and the machine are quickest at.
  Auto
}

/// x · wᵀ for x `[…, k]` and a quantized w `[n, k]`, straight from the codes; the result
/// is `[…, n]`. Fails with `ShapeMismatch`, with `UnsupportedDtype`, and with
/// `InvalidOption` for an arithmetic that the format has not.
@external(erlang, "viva_tensor_gleam_ffi", "matmul")
pub fn matmul(
  x: Tensor,
  by weights: Quantized,
  with options: List(MatmulOption),
) -> Result(Tensor, Error)

/// Rearranges a quantized matrix for this machine's kernels, once for all products with
/// it. The result holds nothing of `quantized`, which can be released.
///
/// Fails with `ShapeMismatch` unless it is a matrix, with `InvalidOption` for a format
/// that is not made of integers as it lies.
@external(erlang, "viva_tensor_gleam_ffi", "prepack")
pub fn prepack(quantized: Quantized) -> Result(Packed, Error)

/// The same product as `matmul`, with rearranged weights and rows of x in 8 bits.
@external(erlang, "viva_tensor_gleam_ffi", "matmul")
pub fn matmul_packed(
  x: Tensor,
  by weights: Packed,
  with options: List(MatmulOption),
) -> Result(Tensor, Error)

/// Error of an approximation; ratios are in decibels. `bound_distance_db` is how far the
/// SQNR stays below the rate–distortion bound of a Gaussian.
pub type Metrics {
  Metrics(
    mse: Number,
    sqnr_db: Number,
    psnr_db: Number,
    cosine: Number,
    mean_error: Number,
    max_error: Number,
    bits_per_weight: Float,
    bound_distance_db: Number,
  )
}

/// How close a quantized tensor is to the original.
@external(erlang, "viva_tensor_gleam_ffi", "metrics")
pub fn metrics(
  of quantized: Quantized,
  against original: Tensor,
) -> Result(Metrics, Error)

/// The error of the layer's output on activations `[…, k]`, ‖X·Wᵀ − X·Ŵᵀ‖ / ‖X·Wᵀ‖.
@external(erlang, "viva_tensor_gleam_ffi", "output_error")
pub fn output_error(
  of quantized: Quantized,
  against original: Tensor,
  on activations: Tensor,
) -> Result(Number, Error)
