#!/usr/bin/env python3
"""Holds `mix viva.convert --layout plain` to transformers: the same logits as the source's values give."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from directory import Dequantized

transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    ("bitsandbytes", "nf4"),
    ("bitsandbytes", "int8"),
    ("awq", "int4"),
    ("gptq", "int3"),
    ("gptq_v2", "int4"),
    ("compressed-tensors", "fp8_e4m3"),
    ("compressed-tensors", "nvfp4"),
    ("mlx", "int4"),
    ("gguf", "q4_0"),
    ("gguf", "q8_0"),
]
TEXT = "In the beginning God created 42 hackers"


def mix(*arguments):
    done = subprocess.run(["mix", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"mix {' '.join(map(str, arguments))} ended with {done.returncode}\n{done.stdout}{done.stderr}")


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens).logits


def reference(model_dir, layout, source, work):
    """The model with the values that the source stands for, without the converter."""
    if layout == "gguf":
        # transformers reads the file itself.
        return AutoModelForCausalLM.from_pretrained(source, gguf_file="model.gguf", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    mix("run", "test/oracle/dequantize.exs", source, work / "values", "f32")
    values = Dequantized(work / "values")
    state = {name: values[name].to(torch.float32) for name in values.names()}
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys, left.unexpected_keys
    return model


def check(model_dir, layout, form, work):
    source, plain = work / "source", work / "plain"
    mix("viva.quantize", model_dir, "--to", source, "--format", form, "--layout", layout)
    mix("viva.convert", source, "--to", plain, "--layout", "plain", "--dtype", "f32")
    loaded, info = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
    problems = [f"{key}: {value}" for key, value in info.items() if value]
    ours, theirs = (AutoTokenizer.from_pretrained(d)(TEXT)["input_ids"] for d in (plain, model_dir))
    if ours != theirs:
        problems.append(f"tokens {ours}, not {theirs}")
    tokens = torch.tensor([theirs])
    expected = logits(reference(model_dir, layout, source, work), tokens)
    if not torch.equal(logits(loaded.float(), tokens), expected):
        problems.append("other logits")
    return problems


def main():
    failed = False
    for model_dir in sys.argv[1:] or [ROOT / "examples/models/viva-tiny"]:
        model_dir = Path(model_dir).resolve()
        for layout, form in SOURCES:
            with tempfile.TemporaryDirectory(prefix="viva_oracle_") as work:
                problems = check(model_dir, layout, form, Path(work))
            failed |= bool(problems)
            print(f"{model_dir.name} {form} in {layout} to plain: {'; '.join(problems) or 'same logits'}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
