#!/usr/bin/env python3
"""Writes the golden fixture of 2:4 sparsity: python make_sparse24.py OUTPUT.safetensors

Needs torch, safetensors and compressed-tensors 0.14.0.1, the last version with sparse-24-bitmask; no GPU.
Weights are pruned by get_24_bytemasks, get scales from calculate_qparams, and are compressed as a model's linear
layer by ModelCompressor.compress_model, codes before sparsity.

    groups                  f32 [256, 4]: every group of four numbers out of 0, 1, 2, 3
    groups/mask             u8 [256, 4]: the two that get_24_bytemasks keeps

A weight is named {dtype}.{rows}x{columns}. What became of it:

    {weight}/pruned                 the weight with zeros where nothing is kept
    {weight}/{scheme}/{tensor}      the tensors of a checkpoint: compressed, bitmask, shape, weight_scale
                     /dequantized   what ModelCompressor.decompress_model makes of them
                     /config        u8, the quantization_config, as ModelCompressor.update_config writes it
    {weight}/cutlass/sparse         the weights that stay, of sparse_semi_structured_from_dense_cutlass
                    /meta           the metadata in rows of 16-bit words, before CUTLASS reorders them
"""

import itertools
import json
import sys
import tempfile

import compressed_tensors
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.sparse_compressors import sparse_24_bitmask
from compressed_tensors.config import Sparse24BitMaskConfig
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch.sparse import _semi_structured_conversions as conversions

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
WEIGHTS = ["f32.32x128", "bf16.32x128", "f16.32x128", "f32.6x100"]


def scheme(preset, format, strategy):
    made = preset_name_to_scheme(preset, ["Linear"])
    weights = {**made.weights.model_dump(), "strategy": strategy}
    return QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=made.input_activations, format=format
    )


SCHEMES = {
    "dense": None,
    "fp8_channel": scheme("FP8_DYNAMIC", "float-quantized", "channel"),
    "fp8_tensor": scheme("FP8_DYNAMIC", "float-quantized", "tensor"),
    "int8_channel": scheme("W8A8", "int-quantized", "channel"),
    "int8_tensor": scheme("W8A8", "int-quantized", "tensor"),
}


def make_weight(shape, dtype, generator):
    """Normal numbers; among them equal magnitudes, both zeros, a row of zeros, and such as 8 bits make zeros of."""
    values = torch.randn(shape, generator=generator) * 0.05
    values[1] = 0.0
    values[2] = (values[2] * 20).round() / 20
    values[3] = (values[3] * 40).round() / 40
    values[4] *= (torch.rand(shape[1], generator=generator) < 0.3) * 1.0
    values[5] *= 10.0 ** torch.randint(-9, 1, (shape[1],), generator=generator)
    values[0, :12] = torch.tensor([0.0, -0.0, 0.75, 1e-5, -1e-9, 0.5, 0.0, 0.0, 1e-9, -1e-9, -0.0, 0.25])
    return values.to(dtype)


def compress(weight, scheme):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    model = torch.nn.Sequential()
    model.add_module("m", linear)
    quantization = None
    if scheme is not None:
        # Not yet compressed: then layers have zero points, of zero, which leave no negative zero of a weight.
        quantization = QuantizationConfig(
            config_groups={"group_0": scheme}, format=scheme.format, ignore=["lm_head"]
        )
        apply_quantization_config(model, quantization)
        grouped = weight if scheme.weights.strategy == "channel" else weight.reshape(1, -1)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
        linear.weight_scale.data = scale.reshape(linear.weight_scale.shape)
    sparsity = Sparse24BitMaskConfig(targets=["Linear"], ignore=["lm_head"], global_sparsity=0.5)
    compressor = ModelCompressor(sparsity_config=sparsity, quantization_config=quantization)
    compressor.compress_model(model)
    tensors = {name.removeprefix("m."): tensor.clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as directory:
        compressor.update_config(directory)
        with open(f"{directory}/config.json") as file:
            text = json.dumps(json.load(file)["quantization_config"])
    tensors["config"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    compressor.decompress_model(model)
    return {**tensors, "dequantized": model.m.weight.data}


def cutlass(weight):
    """With the offsets of the reordering in their own order the metadata stays as it is made."""
    offsets = conversions._calculate_meta_reordering_scatter_offsets
    conversions._calculate_meta_reordering_scatter_offsets = lambda m, columns, *_: torch.arange(m * columns)
    sparse, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    conversions._calculate_meta_reordering_scatter_offsets = offsets
    return {"sparse": sparse, "meta": meta.view(torch.uint8)}


def main(path):
    generator = torch.Generator().manual_seed(1)
    groups = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float32)
    keep = sparse_24_bitmask.get_24_bytemasks
    fixture = {"groups": groups, "groups/mask": keep(groups).to(torch.uint8)}
    for name in WEIGHTS:
        dtype, shape = name.split(".")
        weight = make_weight(tuple(map(int, shape.split("x"))), DTYPES[dtype], generator)
        pruned = torch.where(keep(weight), weight, torch.zeros_like(weight))
        fixture.update({name: weight, f"{name}/pruned": pruned})
        for case, scheme in SCHEMES.items():
            tensors = compress(pruned, scheme)
            fixture.update({f"{name}/{case}/{key}": tensor for key, tensor in tensors.items()})
        if dtype == "bf16":
            fixture.update({f"{name}/cutlass/{key}": tensor for key, tensor in cutlass(pruned).items()})

    made_with = f"compressed-tensors {compressed_tensors.__version__}, torch {torch.__version__}"
    save_file({name: tensor.contiguous() for name, tensor in fixture.items()}, path, metadata={"made_with": made_with})
    print(f"{path}: {len(fixture)} tensors, {made_with}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
