//// Numbers as tensors hold them: some are none that a BEAM float can be.

/// A float, or what IEEE 754 has besides.
pub type Number {
  Finite(Float)
  Infinity
  NegInfinity
  NotANumber
}

/// The float, where the number is finite.
///
/// ```gleam
/// number.to_float(Finite(1.5))
/// // -> Ok(1.5)
/// number.to_float(Infinity)
/// // -> Error(Nil)
/// ```
pub fn to_float(number: Number) -> Result(Float, Nil) {
  case number {
    Finite(float) -> Ok(float)
    Infinity | NegInfinity | NotANumber -> Error(Nil)
  }
}
