#!/usr/bin/env python3
"""Measures the reference programs on the draws of `mix viva.bench quality`:

    pip install -r test/oracle/requirements-quality.txt
    python test/oracle/reference_quality.py bench/results/reference_quality.json

Every row of bench/quality_bars.json that some program quantizes too gets the
figure of what that program makes of the same numbers, with scales rounded to the
dtype in which ours are stored. No GPU; about a quarter of an hour.
"""

import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import bitsandbytes.functional as bnb
import gguf
import libgguf
import mlx.core as mx
import numpy
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from gptqmodel.quantization.quantizer import Quantizer as Gptq
from hqq.core.quantize import Quantizer as Hqq
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.quantization import quant_primitives as torchao

ROOT = Path(__file__).resolve().parents[2]
SHAPE = [4096, 4096]
GGML = {t.name.lower(): t for t in gguf.GGMLQuantizationType}


def bitsandbytes_4bit(x, quant_type, block_size=64, double_quant=False):
    codes, state = bnb.quantize_4bit(
        x.reshape(1, -1), blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
    )
    return bnb.dequantize_4bit(codes, state)


def bitsandbytes_dynamic(x):
    codes, state = bnb.quantize_blockwise(x.reshape(-1), blocksize=256)
    return bnb.dequantize_blockwise(codes, state)


def bitsandbytes_int8(x):
    codes, absmax, _ = bnb.int8_vectorwise_quant(x.half())
    return bnb.int8_vectorwise_dequant(codes, absmax)


def ggml(x, name):
    blocks = libgguf.quantize_rows(x.numpy(), GGML[name])
    return torch.from_numpy(libgguf.dequantize_rows(blocks, GGML[name]))


def gptq(x, bits, group, symmetric=False, mse=0.0):
    """Its quantizer; `mse` is the norm that its search of ranges takes."""
    quantizer = Gptq(types.SimpleNamespace(bits=bits, sym=symmetric, mse=mse, group_size=group))
    quantizer.configure(perchannel=True)
    groups = x.reshape(-1, group)
    quantizer.find_params(groups, weight=True)
    quantizer.scale = quantizer.scale.half().float()
    return quantizer.quantize(groups)


def hqq(x, bits, group):
    codes, meta = Hqq.quantize(x, nbits=bits, group_size=group, axis=1, device="cpu", bitpack=False)
    meta["scale"], meta["zero"] = meta["scale"].half().float(), meta["zero"].half().float()
    return Hqq.dequantize(codes, {**meta, "compute_dtype": torch.float32})


def mlx(x, bits, group):
    codes, scales, biases = mx.quantize(mx.array(x.numpy()), group, bits)
    stored = (part.astype(mx.float16).astype(mx.float32) for part in (scales, biases))
    return torch.from_numpy(numpy.array(mx.dequantize(codes, *stored, group, bits)))


def compressed_tensors(x, format, preset, scale_dtype=torch.float32, **weights):
    made = preset_name_to_scheme(preset, ["Linear"])
    args = {**made.weights.model_dump(), **weights}
    if args["strategy"] not in ("group", "tensor_group"):
        args["group_size"] = None
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=made.input_activations, format=format
    )
    args = scheme.weights
    if args.strategy == "tensor":
        grouped, shape = x.reshape(1, -1), (1,)
    else:
        grouped = x.reshape(-1, args.group_size or x.shape[1])
        shape = (x.shape[0], len(grouped) // x.shape[0])
    state = {"weight": x}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(x.min(), x.max())
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, state.get("weight_global_scale"))
    if scale.dtype == torch.float32:
        scale = scale.to(scale_dtype).float()
    state["weight_scale"], state["weight_zero_point"] = scale.reshape(shape), zero.reshape(shape)
    compressor = BaseCompressor.get_value_from_registry(format)
    return compressor.decompress(compressor.compress(state, scheme), scheme)["weight"]


def torchao_mx(x, dtype):
    return MXTensor.to_mx(x, dtype, 32).dequantize(torch.float32)


def torchao_e5m2(x):
    scale = torchao._choose_scale_float8(x, [1, x.shape[1]], torch.float8_e5m2)
    codes = torchao._quantize_affine_float8(x, scale, torch.float8_e5m2)
    return torchao._dequantize_affine_float8(codes, scale)


def reference(format, block_size=None, method="rtn", symmetric=None, scale=None, zero_point=None, double_quant=False):
    """The program that quantizes to this format with these options, and how."""
    half, group = torch.float16, block_size or (64 if format == "int2" else 128)
    bits = int(format[3:]) if format.startswith("int") else None
    key = (format, block_size, method)
    if method == "rtn" and format in ("nf4", "fp4"):
        return "bitsandbytes", lambda x: bitsandbytes_4bit(x, format, block_size or 64, double_quant)
    if method == "rtn" and format in GGML and (scale == "ggml" or format not in ("mxfp4", "nvfp4")):
        return "libgguf", lambda x: ggml(x, format)
    if key == ("dynamic8", None, "rtn"):
        return "bitsandbytes", bitsandbytes_dynamic
    if scale == "absmax":
        return "bitsandbytes", bitsandbytes_int8
    if key == ("int8", None, "rtn"):
        return "compressed-tensors", lambda x: compressed_tensors(
            x, "int-quantized", "W8A8", symmetric=symmetric is not False
        )
    if key == ("int8", "tensor", "rtn"):
        return "compressed-tensors", lambda x: compressed_tensors(x, "int-quantized", "W8A8", strategy="tensor")
    if bits and method == "hqq":
        return "hqq", lambda x: hqq(x, bits, group)
    if bits and zero_point == "float":
        return ("mlx", lambda x: mlx(x, bits, group)) if method == "rtn" else None
    if bits and method == "mse":
        return "gptqmodel", lambda x: gptq(x, bits, group, bits == 8 or bool(symmetric), mse=2.0)
    if bits and (symmetric or bits == 8):
        return "compressed-tensors", lambda x: compressed_tensors(
            x, "pack-quantized", f"W{bits}A16", half, group_size=group
        )
    if bits:
        return "gptqmodel", lambda x: gptq(x, bits, group)
    if key == ("fp8_e4m3", None, "rtn"):
        return "compressed-tensors", lambda x: compressed_tensors(x, "float-quantized", "FP8_DYNAMIC")
    if key == ("fp8_e4m3", "tensor", "rtn"):
        return "compressed-tensors", lambda x: compressed_tensors(
            x, "float-quantized", "FP8_DYNAMIC", strategy="tensor"
        )
    if key == ("fp8_e5m2", None, "rtn"):
        return "torchao", torchao_e5m2
    if key == ("mxfp8", None, "rtn"):
        return "torchao", lambda x: torchao_mx(x, torch.float8_e4m3fn)
    if key == ("mxfp4", None, "rtn") and scale is None:
        return "torchao", lambda x: torchao_mx(x, torch.float4_e2m1fn_x2)
    if key == ("mxfp4", None, "rtn") and scale == "bump":
        return "compressed-tensors", lambda x: compressed_tensors(
            x, "mxfp4-pack-quantized", "MXFP4A16", group_size=32
        )
    if key == ("nvfp4", None, "rtn") and scale is None:
        return "compressed-tensors", lambda x: compressed_tensors(
            x, "nvfp4-pack-quantized", "NVFP4A16", group_size=16
        )
    return None


def sqnr_db(x, y):
    x, error = x.double(), x.double() - y.reshape(x.shape).double()
    return 10 * torch.log10(x.square().sum() / error.square().sum()).item()


def mean_error(x, y):
    return (x.double() - y.reshape(x.shape).double()).abs().mean().item()


def ggml_error(x, y):
    return (x.double() - y.reshape(x.shape).double()).square().sum().sqrt().item() / x.numel()


def rows(wanted, x, measure):
    measured = []
    for format, options in wanted:
        found = reference(format, **options)
        if found is None:
            continue
        program, run = found
        figure = measure(x, run(x))
        print(f"{measure.__name__} {format} {options}: {figure:.6f} {program}", flush=True)
        version = importlib.metadata.version(program)
        row = {"format": format, "options": options, measure.__name__: figure, "program": f"{program} {version}"}
        measured.append(row)
    return measured


def draws():
    """The numbers of `mix viva.bench quality`, from the program itself."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "draws"
        write = f"[file] = System.argv(); File.write!(file, VivaTensor.CLI.Quality.draws({SHAPE}))"
        subprocess.run(["mix", "run", "-e", write, "--", str(file)], cwd=ROOT, check=True)
        return file.read_bytes()


def main(path):
    bytes = draws()
    x = torch.frombuffer(bytearray(bytes), dtype=torch.float32).reshape(SHAPE)
    square = x.reshape(-1)[: 1024 * 1024].reshape(1024, 1024)
    cosine = (0.1 + 2 * torch.cos(torch.arange(4096, dtype=torch.float64))).float().reshape(1, -1)
    bars = json.loads((ROOT / "bench/quality_bars.json").read_text())
    results = {
        "sqnr_db": rows(((b["format"], b["options"]) for b in bars["sqnr"]), x, sqnr_db),
        "mean_error": rows(((b["format"], b["options"]) for b in bars["mean_error"]), square, mean_error),
        "ggml_error": rows(((b["format"], {**b["options"], "method": "rtn"}) for b in bars["ggml_error"]), cosine, ggml_error),
    }
    programs = {row["program"] for measured in results.values() for row in measured}
    packages = sorted({program.split()[0] for program in programs} | {"torch", "numpy"})
    made_with = {package: importlib.metadata.version(package) for package in packages}
    head = {"made_with": made_with, "shape": SHAPE, "sha256": hashlib.sha256(bytes).hexdigest()}
    Path(path).write_text(text(head, results))


def text(head, results):
    """JSON with a row a line."""
    lists = [
        f'  "{name}": [\n' + ",\n".join(f"    {json.dumps(row)}" for row in measured) + "\n  ]"
        for name, measured in results.items()
    ]
    heads = [f'  "{name}": {json.dumps(value)}' for name, value in head.items()]
    return "{\n" + ",\n".join(heads + lists) + "\n}\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
