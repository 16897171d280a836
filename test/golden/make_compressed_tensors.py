#!/usr/bin/env python3
"""Writes the golden fixture of compressed-tensors: python make_compressed_tensors.py OUTPUT.safetensors

Needs torch, compressed-tensors and safetensors; no GPU. Scales and zero points come from
calculate_qparams, tensors from the compressors, values from decompressing them again.

A weight is named {dtype}.{rows}x{columns}. What became of it:

    {weight}/{scheme}/{tensor}      the tensors of a checkpoint: weight, weight_packed, weight_scale …
                     /dequantized   the weight's shape
                     /config        u8, the quantization_config of a model whose linear layers are all
                                    so, but for lm_head, as ModelCompressor.update_config writes it
"""

import json
import sys
import tempfile

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def scheme(preset, **weights):
    made = preset_name_to_scheme(preset, ["Linear"])
    args = {**made.weights.model_dump(), **weights}
    if args["strategy"] not in ("group", "tensor_group"):
        args["group_size"] = None
    return QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=made.input_activations, format=made.format
    )


# name: format, scheme, the weights that it is tried on
ALL, ROWS, GROUPS = ["f32.16x64", "bf16.16x64", "f32.5x100"], ["f32.16x64", "f32.5x100"], ["f32.16x64", "bf16.16x64"]
SCHEMES = {
    "fp8_channel": ("float-quantized", scheme("FP8_DYNAMIC"), ALL),
    "fp8_tensor": ("float-quantized", scheme("FP8_DYNAMIC", strategy="tensor"), ROWS),
    "fp8_group": ("float-quantized", scheme("FP8_DYNAMIC", strategy="group", group_size=32), GROUPS),
    "fp8_block": ("float-quantized", scheme("FP8_BLOCK", block_structure=[4, 32]), ROWS),
    "int8_channel": ("int-quantized", scheme("W8A8"), ALL),
    "int8_tensor": ("int-quantized", scheme("W8A8", strategy="tensor"), ROWS),
    "int8_channel_asym": ("int-quantized", scheme("W8A8", symmetric=False), ROWS),
    "int8_group": ("pack-quantized", scheme("W8A16", group_size=32), GROUPS),
    "int8_group_asym": ("pack-quantized", scheme("W8A16", group_size=32, symmetric=False), ["f32.16x64"]),
    "int4_group": ("pack-quantized", scheme("W4A16", group_size=32), GROUPS),
    "int4_group_asym": ("pack-quantized", scheme("W4A16_ASYM", group_size=32), GROUPS),
    "int4_channel": ("pack-quantized", scheme("W4A16", strategy="channel"), ROWS),
    "int4_channel_asym": ("pack-quantized", scheme("W4A16_ASYM", strategy="channel"), ROWS),
    "int4_tensor_asym": ("pack-quantized", scheme("W4A16_ASYM", strategy="tensor"), ROWS),
    "int3_group_asym": ("pack-quantized", scheme("W3A16", group_size=32, symmetric=False), ["f32.16x64"]),
    "int3_channel": ("pack-quantized", scheme("W3A16", strategy="channel"), ROWS),
    "int2_group": ("pack-quantized", scheme("W2A16", group_size=32), ["f32.16x64"]),
    "nvfp4": ("nvfp4-pack-quantized", scheme("NVFP4A16", group_size=16), GROUPS),
    "mxfp4": ("mxfp4-pack-quantized", scheme("MXFP4A16", group_size=32), GROUPS),
    "mxfp8": ("mxfp8-quantized", scheme("MXFP8A16", group_size=32), GROUPS),
}


def make_weight(shape, dtype, generator):
    """Normal numbers, with rows of zeros and of one sign, an outlier, tiny values and both zeros among them."""
    values = torch.randn(shape, generator=generator) * 0.05
    values[1] = 0.0
    values[2] = values[2].abs() + 0.01
    values[0, :5] = torch.tensor([0.0, -0.0, 0.75, 1e-5, -1e-5])
    return values.to(dtype)


def blocks(weight, args):
    """The weight as [..., elements that share a scale], and the shape of its scales."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.reshape(1, -1), (1,)
    if args.strategy == "channel":
        return weight, (rows, 1)
    if args.strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        tall, wide = padded.shape[0] // height, padded.shape[1] // width
        cut = padded.reshape(tall, height, wide, width).transpose(1, 2)
        return cut.reshape(tall * wide, -1), (tall, wide)
    return weight.reshape(-1, args.group_size), (rows, columns // args.group_size)


def compress(weight, format, scheme):
    args = scheme.weights
    grouped, shape = blocks(weight, args)
    state = {"weight": weight}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, state.get("weight_global_scale"))
    state["weight_scale"], state["weight_zero_point"] = scale.reshape(shape), zero.reshape(shape)
    compressor = BaseCompressor.get_value_from_registry(format)
    tensors = compressor.compress(state, scheme)
    return {**tensors, "dequantized": compressor.decompress(tensors, scheme)["weight"]}


def config(format, scheme):
    scheme = scheme.model_copy(update={"format": format})
    made = QuantizationConfig(
        config_groups={"group_0": scheme}, format=format, ignore=["lm_head"], quantization_status="compressed"
    )
    with tempfile.TemporaryDirectory() as directory:
        ModelCompressor(quantization_config=made).update_config(directory)
        with open(f"{directory}/config.json") as file:
            text = json.dumps(json.load(file)["quantization_config"])
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def main(path):
    generator = torch.Generator().manual_seed(1)
    fixture = {}
    for name in ALL:
        dtype, shape = name.split(".")
        rows, columns = map(int, shape.split("x"))
        fixture[name] = make_weight((rows, columns), DTYPES[dtype], generator)
    for name, (format, scheme, weights) in SCHEMES.items():
        for weight in weights:
            tensors = compress(fixture[weight], format, scheme)
            tensors["config"] = config(format, scheme)
            fixture.update({f"{weight}/{name}/{key}": tensor for key, tensor in tensors.items()})

    made_with = f"compressed-tensors {compressed_tensors.__version__}, torch {torch.__version__}"
    save_file({name: tensor.contiguous() for name, tensor in fixture.items()}, path, metadata={"made_with": made_with})
    print(f"{path}: {len(fixture)} tensors, {made_with}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
