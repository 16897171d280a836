"""bitsandbytes on the CPU: its layers and its functions."""

import bitsandbytes
import bitsandbytes.functional as functional
import torch

from peer import THREADS, serve

torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Nf4:
    """Blocks of 64; products in bf16."""

    def quantize(self, w):
        return functional.quantize_4bit(w, blocksize=64, quant_type="nf4") + (w,)

    def dequantize(self, q):
        return functional.dequantize_4bit(q[0], q[1])

    values = dequantize

    def nbytes(self, q):
        return q[0].nbytes + q[1].absmax.nbytes

    def layer(self, q):
        n, k = q[2].shape
        layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(q[2], requires_grad=False, quant_type="nf4", blocksize=64)
        return layer.to("cpu").eval()

    def activations(self, x):
        return torch.from_numpy(x).bfloat16()


class Dynamic8:
    """Blocks of 256, with the table of 256 values."""

    def quantize(self, w):
        return functional.quantize_blockwise(w, blocksize=256)

    def dequantize(self, q):
        return functional.dequantize_blockwise(*q)

    values = dequantize


class LlmInt8:
    """One scale a row; the outliers of activations stay floats."""

    def quantize(self, w):
        return functional.int8_vectorwise_quant(w.half())[:2] + (w,)

    def dequantize(self, q):
        return functional.int8_vectorwise_dequant(q[0], q[1])

    values = dequantize

    def nbytes(self, q):
        return q[0].nbytes + q[1].nbytes

    def layer(self, q):
        n, k = q[2].shape
        layer = bitsandbytes.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = bitsandbytes.nn.Int8Params(q[2].half(), requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu").eval()

    def activations(self, x):
        return torch.from_numpy(x).half()


serve(
    {"nf4": Nf4(), "dynamic8": Dynamic8(), "llm.int8": LlmInt8()},
    lambda array, dtype: torch.from_numpy(array).to(DTYPES[dtype]),
)
