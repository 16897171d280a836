#!/usr/bin/env python3
"""Writes the golden fixture of the bitsandbytes formats: python make_bitsandbytes.py OUTPUT.safetensors

Needs torch, bitsandbytes and safetensors; no GPU. Every tensor in the file is an
input or an output of bitsandbytes itself: nothing is computed here a second time.

A weight is named {dtype}.{rows}x{columns}. What became of it:

    {weight}/{nf4|fp4}.b{block}[.dq]/codes          u8 [(n + 1) / 2, 1], first element in the high nibble
                                    /absmax         f32 [blocks]; u8 codes when double quantized
                                    /nested_absmax  f32, when double quantized
                                    /offset         f32 [1], when double quantized
                                    /quant_state    u8, the JSON that a checkpoint carries
                                    /dequantized    the weight's dtype and shape
    {weight}/int8/codes                             i8 [rows, columns], LLM.int8
                 /scale                             f32 [rows], which bitsandbytes calls SCB
                 /dequantized                       f32 [rows, columns]

`dynamic_map`, `nf4_map` and `fp4_map` are the tables of codes.

nested.{n}/{codes|absmax|offset} are n absmax double quantized: absmax i is
(i · 2654435761 mod 2^32) >> 8, divided by 2^24, which any reader can make again.

Compare dequantized zeros without their sign: fp4 code 8 is +0 or -0 depending on
which of its kernels bitsandbytes picks for a shape.
"""

import sys

import bitsandbytes
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params
from safetensors.torch import save_file

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

# Rows that the blocks divide, rows that share blocks, a last block that is not
# full, an odd count of elements.
SHAPES = [(3, 64), (5, 100), (1, 7)]
BLOCKS = [64, 128]

# One block more than a nested block of 256 holds.
NESTED_SHAPE, NESTED_BLOCK = (257, 32), 32

# Around what the sum behind the offset does at once: 8 lanes, 4 rows of them,
# cascades of 16 such rows and of 16 · 16.
NESTED_COUNTS = [1, 7, 8, 31, 33, 257, 511, 1000, 9001]


def make_weight(shape, dtype, generator):
    """Normal numbers, with a row of zeros, an outlier, tiny values and both zeros among them."""
    values = torch.randn(shape, generator=generator) * 0.05
    if shape[0] > 1:
        values[1] = 0.0
    values[0, :5] = torch.tensor([0.0, -0.0, 0.75, 1e-5, -1e-5])
    return values.to(dtype)


def dequantize(codes, state):
    # As one long row: the AVX-512 kernel of 0.50.2 takes a wrong scale when a
    # row is a multiple of 16 but not of the block.
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    values = functional.dequantize_4bit(codes, state).reshape(shape)
    state.shape = shape
    return values


def four_bit(weight, quant_type, block, double_quant):
    codes, state = functional.quantize_4bit(
        weight, blocksize=block, quant_type=quant_type, compress_statistics=double_quant
    )
    tensors = {
        "codes": codes,
        "absmax": state.absmax,
        "quant_state": state.as_dict(packed=True)[f"quant_state.bitsandbytes__{quant_type}"],
        "dequantized": dequantize(codes, state),
    }
    if double_quant:
        tensors["nested_absmax"] = state.state2.absmax
        tensors["offset"] = state.offset.reshape(1)
    return tensors


def int8(weight):
    quantized = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    return {
        "codes": quantized.data,
        "scale": quantized.SCB,
        "dequantized": functional.int8_vectorwise_dequant(quantized.data, quantized.SCB),
    }


def nested(count):
    """Blocks of one number and zeros: their absmax is the number."""
    numbers = (torch.arange(count) * 2654435761 % 2**32) // 2**8
    weight = torch.zeros(count, NESTED_BLOCK)
    weight[:, 0] = numbers.to(torch.float32) / 2**24
    _, state = functional.quantize_4bit(weight, blocksize=NESTED_BLOCK, quant_type="nf4", compress_statistics=True)
    return {"codes": state.absmax, "absmax": state.state2.absmax, "offset": state.offset.reshape(1)}


def main(path):
    # One thread, because torch cuts a long mean by threads and the mean is the nested offset.
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    fixture = {
        "dynamic_map": functional.create_dynamic_map(signed=True),
        "nf4_map": functional.get_4bit_type("nf4", device="cpu"),
        "fp4_map": functional.get_4bit_type("fp4", device="cpu"),
    }

    def add(name, tensors):
        fixture.update({f"{name}/{key}": tensor for key, tensor in tensors.items()})

    for dtype, torch_dtype in DTYPES.items():
        for rows, columns in SHAPES:
            name = f"{dtype}.{rows}x{columns}"
            weight = fixture[name] = make_weight((rows, columns), torch_dtype, generator)
            add(f"{name}/int8", int8(weight))
            for quant_type in ("nf4", "fp4"):
                for block in BLOCKS:
                    add(f"{name}/{quant_type}.b{block}", four_bit(weight, quant_type, block, False))
                    add(f"{name}/{quant_type}.b{block}.dq", four_bit(weight, quant_type, block, True))

    name = "f32.{}x{}".format(*NESTED_SHAPE)
    weight = fixture[name] = make_weight(NESTED_SHAPE, torch.float32, generator)
    add(f"{name}/nf4.b{NESTED_BLOCK}.dq", four_bit(weight, "nf4", NESTED_BLOCK, True))

    for count in NESTED_COUNTS:
        add(f"nested.{count}", nested(count))

    versions = f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}"
    made_with = f"{versions}, cpu capability {torch.backends.cpu.get_cpu_capability()}"
    # One key: safetensors writes several in any order.
    save_file({name: tensor.contiguous() for name, tensor in fixture.items()}, path, metadata={"made_with": made_with})
    print(f"{path}: {len(fixture)} tensors, {made_with}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
