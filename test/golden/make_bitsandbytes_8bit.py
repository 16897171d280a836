#!/usr/bin/env python3
"""Writes the golden fixture of bitsandbytes' 8-bit blocks and LLM.int8() layer.

    python make_bitsandbytes_8bit.py OUTPUT.safetensors

Needs torch, bitsandbytes and safetensors; no GPU. Every tensor in the file is an
input or an output of bitsandbytes itself.

    {dtype}.{count}                      a weight
    {dtype}.{count}/b{block}/codes       u8 [count], of the signed dynamic map
                            /absmax      f32 [blocks]
                            /dequantized the weight's dtype, for blocks of 256

    linear.{case}/weight                 f16 [out, in]
                 /x                      [rows, in], outliers of 6 and more in some columns
                 /y                      x's dtype [rows, out], what Linear8bitLt returns
"""

import sys

import bitsandbytes
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
COUNTS = [7, 1000, 4096 + 100]
BLOCKS = [64, 256, 4096]

# rows, in, out, columns with outliers
LINEARS = {"one": (1, 160, 16, 3), "many": (5, 160, 16, 4), "none": (3, 96, 16, 0), "all": (2, 32, 8, 32)}


def make_weight(count, dtype, generator):
    """Normal numbers, with zeros of both signs, tiny values and a block of zeros among them."""
    values = torch.randn(count, generator=generator) * 0.05
    values[:5] = torch.tensor([0.0, -0.0, 0.75, 1e-5, -1e-7])
    values[256:512] = 0.0
    return values.to(dtype)


def blockwise(weight, block):
    codes, state = functional.quantize_blockwise(weight, blocksize=block)
    tensors = {"codes": codes, "absmax": state.absmax}
    if block == 256:
        tensors["dequantized"] = functional.dequantize_blockwise(codes, state)
    return tensors


def linear(rows, columns, out, outliers, dtype, generator):
    weight = (torch.randn((out, columns), generator=generator) * 0.05).half()
    x = torch.randn((rows, columns), generator=generator)
    for column in torch.randperm(columns, generator=generator)[:outliers]:
        # Not in every row: the others of such a column stay in 16 bits too.
        signs = torch.randn(x[::2, column].shape, generator=generator).sign()
        x[::2, column] = signs * (6 + 20 * torch.rand((), generator=generator))
    layer = bitsandbytes.nn.Linear8bitLt(columns, out, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu").eval()
    x = x.to(dtype)
    with torch.inference_mode():
        return {"weight": weight, "x": x, "y": layer(x.clone())}


def main(path):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    fixture = {}
    for dtype, torch_dtype in DTYPES.items():
        for count in COUNTS:
            name = f"{dtype}.{count}"
            weight = fixture[name] = make_weight(count, torch_dtype, generator)
            for block in BLOCKS:
                fixture.update({f"{name}/b{block}/{key}": value for key, value in blockwise(weight, block).items()})
        for case, sizes in LINEARS.items():
            tensors = linear(*sizes, torch_dtype, generator)
            fixture.update({f"linear.{case}.{dtype}/{key}": value for key, value in tensors.items()})
    versions = f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}"
    made_with = f"{versions}, cpu capability {torch.backends.cpu.get_cpu_capability()}"
    save_file({name: tensor.contiguous() for name, tensor in fixture.items()}, path, metadata={"made_with": made_with})
    print(f"{path}: {len(fixture)} tensors, {made_with}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
