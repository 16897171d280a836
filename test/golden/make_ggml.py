#!/usr/bin/env python3
"""Writes the golden fixture of ggml's block formats: python make_ggml.py OUTPUT.safetensors

Needs numpy, torch, safetensors, libgguf (ggml's quantizers) and gguf. Every tensor in
the file is an input or an output of libgguf; gguf's own dequantizer has to
agree with it to the bit.

    {weight}                  f32 [rows, columns]
    {weight}/{format}         u8 [rows, bytes of a row]
    random/{format}           u8 [2, bytes of a row], random blocks with finite scales
    random/{format}/values    f32 [2, 512]

Weights: `gaussian`; `viva-tiny`, rows of a trained layer; `edges`, a row each
of what has a way to go wrong (see make_edges).
"""

import importlib.metadata
import pathlib
import sys

import gguf
import libgguf
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

# Every format, with where its f16 scales lie in a block.
FORMATS = {
    "q8_0": [0],
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q6_k": [208],
    "q5_k": [0, 2],
    "q4_k": [0, 2],
    "q3_k": [108],
    "q2_k": [80, 82],
    "iq4_nl": [0],
    "iq4_xs": [0],
}

# Formats of small floats, with the bytes of scales of small floats in a block
# and the greatest of them that is a number.
SMALL_FLOATS = {"mxfp4": (1, 0xFE), "nvfp4": (4, 0x7E)}

MODEL = pathlib.Path(__file__).parents[2] / "examples/models/viva-tiny/model.safetensors"


def qtype(name):
    names = {t.name.lower(): t for t in gguf.GGMLQuantizationType}
    return names[name]


def make_edges(rng):
    g = rng.standard_normal(256)
    signs = np.where(rng.random(256) < 0.5, 0.0, -0.0)
    halves = rng.integers(-253, 254, 256) / 2
    halves[::32] = 127.0
    # A sub-block of zeros, of subnormals, of tiny values, among others that are not.
    mixed = g.copy()
    mixed[0:32] = 0.0
    mixed[64:96] *= 1e-39
    mixed[128:160] *= 1e-10
    mixed[192:208] *= 1e-4
    steep = g * 10.0 ** (np.arange(256) // 16 % 8 - 4)
    return np.stack([
        signs,
        np.full(256, 0.3),
        np.full(256, -0.3),
        np.abs(g) + 0.01,
        -np.abs(g) - 0.01,
        halves,
        mixed,
        steep,
        g * 1e-39,
        g * 1e-30,
        g * 1e-8,
        g * 1e-6,
        g * 1e4,
        # An offset that dwarfs the differences.
        -1e4 + g * 1e-2,
        100.0 + g,
        np.where(np.arange(256) % 32 == 7, 50.0, g),
        np.round(g * 2),
    ]).astype(np.float32)


def random_blocks(name, rng):
    """Random bytes, but scales that are numbers."""
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[qtype(name)]
    blocks = rng.integers(0, 256, (1024 // block_len, block_bytes), dtype=np.uint8)
    if name in SMALL_FLOATS:
        scales, most = SMALL_FLOATS[name]
        blocks[:, :scales] %= most + 1
    for at in FORMATS.get(name, []):
        scales = rng.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(2, -1)


def add(fixture, formats, rng):
    for weight in [name for name in fixture if "/" not in name]:
        for name in formats:
            fixture[f"{weight}/{name}"] = libgguf.quantize_rows(fixture[weight], qtype(name))
    for name in formats:
        blocks = random_blocks(name, rng)
        values = libgguf.dequantize_rows(blocks, qtype(name))
        again = gguf.quants.dequantize(blocks, qtype(name)).astype(np.float32)
        assert values.tobytes() == again.tobytes(), name
        fixture[f"random/{name}"] = blocks
        fixture[f"random/{name}/values"] = values


def main(path):
    rng = np.random.default_rng(1)
    with safe_open(MODEL, "pt") as model:
        trained = model.get_tensor("model.layers.0.mlp.down_proj.weight")[:3]
    fixture = {
        "gaussian": rng.standard_normal((3, 512)).astype(np.float32),
        "viva-tiny": trained.float().numpy(),
        "edges": make_edges(rng),
    }
    add(fixture, FORMATS, rng)
    add(fixture, SMALL_FLOATS, rng)

    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("libgguf", "gguf", "numpy"))
    save_file(fixture, path, metadata={"made_with": versions})
    print(f"{path}: {len(fixture)} tensors, {versions}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
