#!/usr/bin/env python3
"""2:4 sparsity of a whole model: perplexity by what chose the zeros, alone and rounded.

    python3 bench/methods/sparsity.py MODEL_DIR CALIBRATION_TEXT EVAL_TEXT \
        [--tokens 16384] [--window 384] [--windows 120] [--json bench/results/sparsity.json]

Records what the layers meet on the first text, has the library prune and round each of
them, puts the weights back into the transformers model and measures its perplexity on the
second text. `error` is that of a layer's output on tokens of the second text, the mean of
the layers. Exits with 1 unless sparsegpt < wanda < magnitude. Needs torch, transformers
and safetensors, and mix; small models are measured sooner with OMP_NUM_THREADS=1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "test" / "oracle"))
from perplexity import Perplexity  # noqa: E402

KINDS = ["magnitude", "wanda", "sparsegpt"]


def record(args, text, out, tokens):
    script = ROOT / "examples" / "calibration" / "record.py"
    sizes = ["--tokens", str(tokens), "--window", str(args.window)]
    subprocess.run([sys.executable, script, args.model, text, out, *sizes], check=True)


def measure(perplexity, directory):
    """With the weights of a directory."""
    saved = {}
    with torch.no_grad():
        for file in directory.iterdir():
            parameter = perplexity.model.get_parameter(file.name)
            saved[file.name] = parameter.clone()
            values = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)
            parameter.copy_(values.reshape(parameter.shape))
        result = perplexity.measure()
        for name, value in saved.items():
            perplexity.model.get_parameter(name).copy_(value)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration_text")
    parser.add_argument("eval_text")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=384)
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        seen, held = out / "seen.safetensors", out / "held.safetensors"
        record(args, args.calibration_text, seen, args.tokens)
        record(args, args.eval_text, held, 2048)
        script = ["mix", "run", "bench/methods/sparsity.exs"]
        subprocess.run([*script, args.model, seen, held, out], cwd=ROOT, check=True)
        perplexity = Perplexity(args.model, args.eval_text, args.window, args.windows)
        print(f"perplexity of the model as it is: {perplexity.float:.4f}\n", flush=True)
        print(f"{'zeros by':10} {'format':6} {'rounded':9} {'bits':>7} {'error':>8} {'perplexity':>11}")
        for line in (out / "index.tsv").read_text().splitlines():
            number, kind, form, how, bits, error = line.split("\t")
            value = measure(perplexity, out / number)
            print(f"{kind:10} {form:6} {how:9} {float(bits):7.3f} {float(error):8.4f} {value:11.4f}", flush=True)
            row = {"zeros": kind, "format": form, "rounded": how, "bits": round(float(bits), 4)}
            rows.append(row | {"error": round(float(error), 5), "perplexity": round(value, 4)})

    alone = [row["perplexity"] for kind in KINDS for row in rows if (row["zeros"], row["rounded"]) == (kind, "-")]
    if args.json:
        figures = {
            "model": Path(args.model).name,
            "tokens": args.tokens,
            "window": args.window,
            "windows": args.windows,
            "perplexity": round(perplexity.float, 4),
        }
        lines = ",\n".join("    " + json.dumps(row) for row in rows)
        head = json.dumps(figures, indent=2).removesuffix("\n}")
        args.json.write_text(f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n')
    if not alone[0] > alone[1] > alone[2]:
        raise SystemExit(f"not in order: {dict(zip(KINDS, alone))}")


if __name__ == "__main__":
    main()
