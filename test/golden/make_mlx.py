#!/usr/bin/env python3
"""Writes the golden fixture of MLX's affine layout: python make_mlx.py OUTPUT.safetensors

Needs mlx (with mlx-cpu) and numpy; no GPU. Every tensor in the file is an input
or an output of mlx itself.

    {weight}                                          {dtype}.{rows}x{columns}
    {weight}/b{bits}.g{group}/weight                  u32 [rows, columns · bits / 32]
                             /scales, /biases         the weight's dtype [rows, columns / group]
                             /dequantized             f32 [rows, columns], for groups of 64

Dequantized from scales and biases widened to f32: in 16 bits mlx rounds the
product and the sum apart, on the CPU.
"""

import importlib.metadata
import sys

import mlx.core as mx
import numpy

DTYPES = {"f32": mx.float32, "bf16": mx.bfloat16, "f16": mx.float16}
COLUMNS = 256
CASES = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


def make_weight(dtype, generator):
    """Normal numbers, with groups of zeros, of one sign, of tiny and of equal values among them."""
    values = generator.normal(size=(3, COLUMNS)).astype(numpy.float32) * 0.05
    values[0, :128] = 0.0
    values[0, 128:] = numpy.abs(values[0, 128:]) + 0.01
    values[1, :64] = -numpy.abs(values[1, :64])
    values[1, 64:128] = 0.25
    values[1, 128:] *= 1e-6
    values[2, 7] = 3.0
    return mx.array(values).astype(dtype)


def main(path):
    mx.set_default_device(mx.cpu)
    generator = numpy.random.default_rng(1)
    fixture = {}
    for dtype, mx_dtype in DTYPES.items():
        name = f"{dtype}.3x{COLUMNS}"
        weight = fixture[name] = make_weight(mx_dtype, generator)
        for bits, group in CASES:
            codes, scales, biases = mx.quantize(weight, group, bits)
            parts = {"weight": codes, "scales": scales, "biases": biases}
            if group == 64:
                wide = (scales.astype(mx.float32), biases.astype(mx.float32))
                parts["dequantized"] = mx.dequantize(codes, *wide, group, bits)
            fixture.update({f"{name}/b{bits}.g{group}/{part}": array for part, array in parts.items()})
    made_with = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("mlx", "mlx-cpu"))
    mx.save_safetensors(path, fixture, {"made_with": made_with})
    print(f"{path}: {len(fixture)} tensors, {made_with}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
