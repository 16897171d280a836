//// How a quantized tensor is spelled in a file.

/// A layout that other programs load.
pub type Layout {
  Bitsandbytes
  Awq
  CompressedTensors
  Gptq
  GptqV2
  Mlx
  Gguf
  /// Floats in safetensors files, without a trace of quantization: of `Convert` alone.
  Plain
}
