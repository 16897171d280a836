#!/usr/bin/env python3
"""Writes the golden fixture of the GPTQ layout: python make_gptq.py OUTPUT.safetensors

Needs torch, gptqmodel and safetensors; no GPU. Codes and zero points are drawn at
random, zero points of 0 among them; gptqmodel packs and dequantizes them.

    b{bits}.g{group}[.sym][.act]/scales          f16 [groups, out], as gptqmodel stores them
                                /g_idx           i32 [in], permuted in act order
                                /qweight         i32 [in · bits / 32, out]
                                /qzeros          i32 [groups, out · bits / 32], checkpoint_format gptq_v2
                                /qzeros_v1       the same in checkpoint_format gptq
                                /dequantized     f16 [out, in]
"""

import importlib.metadata
import sys

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.utils.backend import BACKEND
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

OUT, IN = 32, 128
CASES = [
    (bits, group, sym, act)
    for bits in (2, 3, 4, 8)
    for group, sym, act in ((32, False, False), (IN, False, False), (64, True, False), (32, False, True))
]


def make(bits, group, sym, act, generator):
    groups, top = IN // group, 2**bits
    codes = torch.randint(0, top, (OUT, IN), generator=generator)
    zeros = torch.randint(0, top, (OUT, groups), generator=generator)
    if sym:
        zeros[:] = top // 2
    scales = (torch.rand((OUT, groups), generator=generator) * 0.01 + 0.001).half()
    g_idx = torch.arange(IN, dtype=torch.int32) // group
    if act:
        g_idx = g_idx[torch.randperm(IN, generator=generator)].contiguous()
    column = g_idx.long()
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = (codes - zeros[:, column]) * scales.float()[:, column]
    layer = TorchLinear(
        bits=bits, group_size=group, sym=sym, desc_act=act, in_features=IN, out_features=OUT,
        bias=False, pack_dtype=torch.int32, backend=BACKEND.GPTQ_TORCH, register_buffers=True,
    )
    layer.pack_block(linear, scales.float(), zeros.float(), g_idx)
    layer.post_init()
    tensors = {
        "scales": layer.scales.clone(),
        "g_idx": g_idx,
        "qweight": layer.qweight.clone(),
        "qzeros": layer.qzeros.clone(),
        "dequantized": layer.dequantize_weight().t().contiguous(),
    }
    convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=group))
    return {**tensors, "qzeros_v1": layer.qzeros.clone()}


def main(path):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    fixture = {}
    for bits, group, sym, act in CASES:
        name = f"b{bits}.g{group}{'.sym' * sym}{'.act' * act}"
        fixture.update({f"{name}/{key}": value for key, value in make(bits, group, sym, act, generator).items()})
    made_with = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("gptqmodel", "torch"))
    save_file({name: tensor.contiguous() for name, tensor in fixture.items()}, path, metadata={"made_with": made_with})
    print(f"{path}: {len(fixture)} tensors, {made_with}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
