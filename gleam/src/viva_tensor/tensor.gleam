//// Dense, row-major tensors that native code reads in place.
////
//// Elements live in a `BitArray`, in a mapped file or in memory of the library; none
//// is copied on the way in. A tensor is immutable, and cheap to send to another process
//// of the same node.

import viva_tensor/error.{type Error}
import viva_tensor/number.{type Number}

/// A dense tensor. It is made by the functions of this module, by
/// `checkpoint.get`, or as the result of an operation.
pub type Tensor

/// What an element is. 8-bit floats are numbers as they stand: a scale that a
/// checkpoint keeps beside them is not applied.
pub type Dtype {
  F64
  F32
  F16
  Bf16
  F8E4m3
  F8E5m2
  /// Powers of two.
  F8E8m0
  I64
  I32
  I16
  I8
  U64
  U32
  U16
  U8
  Bool
}

/// A tensor over the bits, read in place: row-major, little-endian.
///
/// Fails with `SizeMismatch` unless they are exactly those of the shape.
///
/// ```gleam
/// tensor.from_bits(<<1.0:little-size(32), 2.0:little-size(32)>>, dtype: F32, shape: [2])
/// ```
@external(erlang, "viva_tensor_gleam_ffi", "from_bits")
pub fn from_bits(
  bits: BitArray,
  dtype dtype: Dtype,
  shape shape: List(Int),
) -> Result(Tensor, Error)

/// A tensor of a float dtype with the elements of a list, in row-major order. What the
/// dtype cannot hold exactly is rounded to nearest, ties to even.
///
/// Fails with `SizeMismatch` when the list is too long or too short.
///
/// ```gleam
/// tensor.from_list([0.5, -1.0, 0.25, 1.0], dtype: F32, shape: [2, 2])
/// ```
@external(erlang, "viva_tensor_gleam_ffi", "from_list")
pub fn from_list(
  elements: List(Float),
  dtype dtype: Dtype,
  shape shape: List(Int),
) -> Result(Tensor, Error)

/// The elements as bits: row-major, little-endian.
@external(erlang, "viva_tensor_gleam_ffi", "to_bits")
pub fn to_bits(tensor: Tensor) -> Result(BitArray, Error)

/// The elements as a flat list, whatever the dtype: integers become floats, `True` 1.0.
@external(erlang, "viva_tensor_gleam_ffi", "to_list")
pub fn to_list(tensor: Tensor) -> Result(List(Number), Error)

/// The same values in a float dtype, each rounded once from f32.
@external(erlang, "viva_tensor_gleam_ffi", "cast")
pub fn cast(tensor: Tensor, to dtype: Dtype) -> Result(Tensor, Error)

/// What the elements are.
@external(erlang, "viva_tensor_gleam_ffi", "dtype")
pub fn dtype(tensor: Tensor) -> Dtype

/// The sizes of the dimensions, the outermost first.
@external(erlang, "viva_tensor_gleam_ffi", "shape")
pub fn shape(tensor: Tensor) -> List(Int)

/// Gives up the memory now instead of when it is garbage collected. Calls that already
/// read it finish; later ones fail with `Released`.
@external(erlang, "viva_tensor_gleam_ffi", "release")
pub fn release(tensor: Tensor) -> Nil
