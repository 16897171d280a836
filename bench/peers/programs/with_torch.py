"""Plain torch: floats, oneDNN's int8 with activations scaled as they come, and the
int4 kernel that torchao calls on CPUs (tinygemm)."""

import torch

from peer import THREADS, Unquantized, serve

torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Floats(Unquantized):
    def __init__(self, dtype):
        self.dtype, self.quantizes = DTYPES[dtype], dtype

    def layer(self, w):
        return lambda x: torch.nn.functional.linear(x, w)

    def activations(self, x):
        return torch.from_numpy(x).to(self.dtype)


class Int8:
    """One scale a row for weights, one a tensor for activations."""

    quantizes = "f32"

    def quantize(self, w):
        scales = w.abs().amax(1) / 127
        return torch.quantize_per_channel(w, scales, torch.zeros(len(w), dtype=torch.int64), 0, torch.qint8)

    def dequantize(self, q):
        return q.dequantize()

    values = dequantize

    def nbytes(self, q):
        return q.numel() + 4 * len(q)

    def layer(self, q):
        packed = torch.ops.quantized.linear_prepack(q, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed)

    def activations(self, x):
        return torch.from_numpy(x)


class Int4:
    """Groups of 128, a scale and a float zero point in bf16."""

    quantizes, group = "f32", 128

    def quantize(self, w):
        groups = w.reshape(len(w), -1, self.group)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp(min=1e-8).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        codes = torch.round((groups - zero.float()[..., None]) / scale.float()[..., None]) + 8
        return codes.clamp(0, 15).to(torch.int32).reshape(w.shape), scale, zero

    def values(self, q):
        codes, scale, zero = q
        groups = codes.reshape(len(codes), -1, self.group) - 8
        return (groups * scale.float()[..., None] + zero.float()[..., None]).reshape(codes.shape)

    def nbytes(self, q):
        codes, scale, zero = q
        return codes.numel() // 2 + scale.nbytes + zero.nbytes

    def layer(self, q):
        codes, scale, zero = q
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        parameters = torch.stack([scale.T, zero.T], -1).contiguous()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, self.group, parameters)

    def activations(self, x):
        return torch.from_numpy(x).bfloat16()


serve(
    {"f32": Floats("f32"), "bf16": Floats("bf16"), "int8": Int8(), "int4 g128": Int4()},
    lambda array, dtype: torch.from_numpy(array).to(DTYPES[dtype]),
)
