//// How codes and scales are chosen.

/// A method. Those from `Gptq` on look at the `Activations` among the settings, or, in a
/// job, at the file that `Statistics` names.
pub type Method {
  /// Round to nearest.
  Rtn
  /// Scales searched for the least squared error.
  Mse
  /// Float zero points found by half-quadratic splitting, for integers.
  Hqq
  /// Column by column, each making up for the error of those before.
  Gptq
  /// Columns scaled by what they meet, then blocks clipped.
  Awq
  /// Columns scaled as AWQ scales them, then GPTQ.
  AwqGptq
  /// Columns scaled so that activations fit in 8 bits too.
  Smoothquant
  /// A Hadamard rotation of the input, which spreads outliers.
  Rotate
}
