#!/usr/bin/env python3
"""Writes the golden fixture of the AWQ layout: python make_awq.py OUTPUT.safetensors

Needs torch, gptqmodel and safetensors; no GPU. Codes and zero points are drawn at
random; gptqmodel packs and dequantizes them.

    g{group}/qweight       i32 [in, out / 8], as AWQ's GEMM kernels read it
            /qzeros        i32 [groups, out / 8]
            /scales        f16 [groups, out]
            /dequantized   f16 [out, in]
"""

import importlib.metadata
import sys

import torch
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear, dequantize_gemm
from safetensors.torch import save_file

OUT, IN = 48, 256
GROUPS = [32, 64, 128, 256]


def make(group, generator):
    codes = torch.randint(0, 16, (OUT, IN), generator=generator)
    zeros = torch.randint(0, 16, (OUT, IN // group), generator=generator)
    scales = (torch.rand((OUT, IN // group), generator=generator) * 0.01 + 0.001).half()
    column = torch.arange(IN) // group
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = (codes - zeros[:, column]) * scales.float()[:, column]
    layer = AwqTorchLinear(
        bits=4, group_size=group, sym=False, desc_act=False,
        in_features=IN, out_features=OUT, register_buffers=True,
    )
    layer.pack(linear, scales.float(), zeros.float())
    values = dequantize_gemm(
        qweight=layer.qweight, qzeros=layer.qzeros, scales=layer.scales, bits=4, group_size=group,
    )
    return {
        "qweight": layer.qweight,
        "qzeros": layer.qzeros,
        "scales": layer.scales,
        "dequantized": values.t(),
    }


def main(path):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    fixture = {}
    for group in GROUPS:
        for key, value in make(group, generator).items():
            fixture[f"g{group}/{key}"] = value.clone().contiguous()
    made_with = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("gptqmodel", "torch"))
    save_file(fixture, path, metadata={"made_with": made_with})
    print(f"{path}: {len(fixture)} tensors, {made_with}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
