#!/usr/bin/env python3
"""Writes the golden fixture of HQQ: python make_hqq.py OUTPUT.safetensors

Needs torch, hqq, safetensors and numpy; no GPU. One weight of normal numbers and
one of heavy tails, each a row-major [rows, columns], and what hqq makes of them
in groups of 64 along the rows, scale and zero point stored as f16:

    {weight}                          f32 [rows, columns]
    {weight}/b{bits}/squared_error    f64 [1], the sum over all elements
                    /absolute_error   f64 [1]

The quantizer's bytes are its own affair; its errors are what ours are held to.
"""

import importlib.metadata
import sys

import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import save_file

ROWS, COLUMNS, GROUP = 48, 256, 64


def errors(weight, bits):
    codes, meta = Quantizer.quantize(weight, nbits=bits, group_size=GROUP, axis=1, device="cpu", bitpack=False)
    meta["scale"], meta["zero"] = meta["scale"].half().float(), meta["zero"].half().float()
    error = (weight - Quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32})).double()
    return {"squared_error": error.square().sum().reshape(1), "absolute_error": error.abs().sum().reshape(1)}


def main(path):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn((ROWS, COLUMNS), generator=generator)
    weights = {"normal": normal * 0.05, "heavy": torch.randn((ROWS, COLUMNS), generator=generator) ** 3}
    fixture = dict(weights)
    for name, weight in weights.items():
        for bits in (2, 3, 4, 5, 6, 8):
            fixture.update({f"{name}/b{bits}/{key}": value for key, value in errors(weight, bits).items()})
    made_with = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("hqq", "torch"))
    save_file(fixture, path, metadata={"made_with": made_with})
    print(f"{path}: {len(fixture)} tensors, {made_with}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
