//// What can be chosen of a format: its options and the method.

import viva_tensor/method.{type Method}
import viva_tensor/tensor.{type Dtype, type Tensor}

/// One option of `viva_tensor.quantize` or of a job. A format that does not have it
/// refuses it with `InvalidOption`.
pub type Setting {
  /// Elements that share a scale.
  BlockSize(Int)
  /// One scale for each row, or one for all, instead of blocks.
  ScalesPer(Extent)
  /// Integers without a zero point, or with one.
  Symmetric(Bool)
  /// How integers with a zero point store it.
  ZeroPoint(ZeroPoint)
  /// By which rule a scale is chosen.
  Scale(Rule)
  /// What scales are stored as.
  ScaleDtype(Dtype)
  /// Whether scales are quantized too, for `Nf4` and `Fp4`.
  DoubleQuant(Bool)
  /// Groups in GPTQ's order, for integers.
  ActOrder(Bool)
  /// What `Sparse24` keeps its weights as.
  Values(Values)
  /// How codes and scales are chosen; round to nearest, if not given.
  Method(Method)
  /// What the layer meets, a tensor `[tokens, k]`, for methods that look at it.
  Activations(Tensor)
  /// How such a method chooses the scales of blocks: `Rtn` or `Mse`.
  Scales(Method)
  /// Of GPTQ: the share of the mean that is added to the diagonal.
  Damping(Float)
  /// Of GPTQ: in which order columns are done.
  Order(Order)
  /// Of GPTQ: zeros for two of every four columns on the way.
  Sparsity(Sparsity)
  /// Of AWQ: whether blocks are clipped too.
  Clip(Bool)
  /// Of AWQ: which scales of columns are tried.
  DuoScaling(DuoScaling)
  /// A Hadamard rotation of the input before the method.
  Rotate(Bool)
}

/// What shares one scale.
pub type Extent {
  Row
  WholeTensor
}

/// How a zero point is stored.
pub type ZeroPoint {
  Integer
  Float
}

/// By which rule a scale is chosen; which of them a format has, is in the documentation
/// of `VivaTensor.quantize/3`.
pub type Rule {
  Step
  Absmax
  Floor
  Bump
  Round
  Ggml
}

/// What `Sparse24` keeps its weights as; `Source` is the dtype of the tensor.
pub type Values {
  Source
  F32
  F16
  Bf16
  Int8
  Fp8E4m3
}

/// In which order GPTQ does columns.
pub type Order {
  Natural
  Activation
}

/// By what the two of four that stay are chosen.
pub type Sparsity {
  Magnitude
  Wanda
  Sparsegpt
}

/// Which scales AWQ tries: powers of what a column meets, or those against powers of
/// what it holds, or both.
pub type DuoScaling {
  Off
  On
  Both
}
