//// How numbers are stored.

/// A format. What each is good for, and what its options mean, is in the
/// documentation of `VivaTensor.quantize/3` and in the pages about formats.
pub type Format {
  /// 8-bit integers, one scale a row, tensor or block.
  Int8
  /// 6-bit integers in groups of 128 with a zero point.
  Int6
  /// 5-bit integers in groups of 128 with a zero point.
  Int5
  /// 4-bit integers in groups of 128 with a zero point.
  Int4
  /// 3-bit integers in groups of 128 with a zero point.
  Int3
  /// 2-bit integers in groups of 64 with a zero point.
  Int2
  /// The 4-bit table of QLoRA, blocks of 64.
  Nf4
  /// 4-bit floats of bitsandbytes, blocks of 64.
  Fp4
  /// The 8-bit dynamic map of bitsandbytes, blocks of 256.
  Dynamic8
  /// 8-bit floats with 3 bits of mantissa.
  Fp8E4m3
  /// 8-bit floats with 2 bits of mantissa.
  Fp8E5m2
  /// The OCP's MX: 8-bit floats, a power of two for 32 of them.
  Mxfp8
  /// The same with 2 bits of mantissa.
  Mxfp8E5m2
  /// The OCP's MX: 4-bit floats, a power of two for 32 of them.
  Mxfp4
  /// 4-bit floats, an 8-bit scale for 16 of them.
  Nvfp4
  /// 2:4 sparsity: two of every four weights.
  Sparse24
  /// ggml's q8_0, blocks of 32.
  Q80
  /// ggml's q5_1, blocks of 32.
  Q51
  /// ggml's q5_0, blocks of 32.
  Q50
  /// ggml's q4_1, blocks of 32.
  Q41
  /// ggml's q4_0, blocks of 32.
  Q40
  /// ggml's q6_k, blocks of 256.
  Q6K
  /// ggml's q5_k, blocks of 256.
  Q5K
  /// ggml's q4_k, blocks of 256.
  Q4K
  /// ggml's q3_k, blocks of 256.
  Q3K
  /// ggml's q2_k, blocks of 256.
  Q2K
  /// ggml's iq4_nl, blocks of 32.
  Iq4Nl
  /// ggml's iq4_xs, blocks of 256.
  Iq4Xs
}

/// Every format of the viva_tensor that is loaded.
@external(erlang, "viva_tensor_gleam_ffi", "formats")
pub fn all() -> List(Format)

/// The name that Elixir and the command line have for it, such as `"q4_k"`.
@external(erlang, "viva_tensor_gleam_ffi", "format_name")
pub fn name(of format: Format) -> String
