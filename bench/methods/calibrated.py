#!/usr/bin/env python3
"""What calibrated methods do to a model: ours, GPTQModel's and AutoAWQ's on the same
weights and activations.

    python3 bench/methods/calibrated.py MODEL_DIR CALIBRATION_TEXT EVALUATION_TEXT \
        [--bits 4,3] [--seeds 3] [--tokens 65536] [--window 384] [--windows 120] \
        [--autoawq PYTHON] [--json OUT]

For every seed another part of the calibration text is recorded. Every linear layer is
quantized in groups of 128 with integer zero points, written back as it dequantizes, and
the model's perplexity on the evaluation text is taken by transformers, as is each
layer's output error on activations recorded from that text, which no method saw.

Needs requirements-calibrated.txt, and `mix` on the path. AutoAWQ wants a transformers
of its own time: PYTHON is that of an environment with requirements-autoawq.txt; without
it the table says that AutoAWQ did not run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT / "test" / "oracle"), str(ROOT / "examples" / "calibration")]

import peers  # noqa: E402
from perplexity import Perplexity  # noqa: E402

# AutoAWQ multiplies every candidate with all tokens, so it gets fewer than GPTQ's sums
# take; ours judges by 512.
AWQ_TOKENS = 4096

OURS = ["rtn", "mse", "gptq", "awq", "awq_gptq"]


def record(model, text, out, args, tokens, skip=0):
    subprocess.run(
        [sys.executable, ROOT / "examples/calibration/record.py", model, text, out]
        + ["--tokens", str(tokens), "--window", str(args.window), "--skip", str(skip)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def inputs_of(model, layers, windows):
    """What the layers meet on windows of tokens, each after the first token."""
    seen = {name: [] for name in layers}

    def keep(name):
        return lambda _module, x: seen[name].append(x[0].detach().reshape(-1, x[0].shape[-1]))

    hooks = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in layers]
    with torch.no_grad():
        for window in windows.split(8):
            first = torch.full((len(window), 1), model.config.bos_token_id)
            model(input_ids=torch.cat([first, window], 1))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(x) for name, x in seen.items()}


class Judge:
    def __init__(self, args):
        self.perplexity = Perplexity(args.model, args.evaluation, args.window, args.windows)
        model = self.perplexity.model
        self.layers = [
            n
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()
        ]
        self.weights = {n: model.get_submodule(n).weight.detach().clone() for n in self.layers}
        every = max(1, len(self.perplexity.windows) // 16)
        self.held_out = inputs_of(model, self.layers, self.perplexity.windows[::every])

    @torch.no_grad()
    def __call__(self, quantized):
        """Perplexity, and the relative output error of each layer."""
        errors = {}
        for name, back in quantized.items():
            weight, x = self.weights[name], self.held_out[name]
            errors[name] = ((x @ (weight - back).T).norm() / (x @ weight.T).norm()).item()
            self.perplexity.model.get_submodule(name).weight.copy_(back)
        measured = self.perplexity.measure()
        for name, weight in self.weights.items():
            self.perplexity.model.get_submodule(name).weight.copy_(weight)
        return measured, errors


def ours(args, judge, bits, stats, scratch):
    """Every method of ours, quantized by the library itself."""
    subprocess.run(
        ["mix", "run", HERE / "calibrated.exs", args.model, stats, scratch, str(bits)] + OURS,
        check=True,
        cwd=ROOT,
    )
    for method in OURS:
        yield f"viva_tensor {method}", {
            name: torch.from_numpy(
                np.fromfile(Path(scratch) / f"{method}.{name}.f32", dtype="<f4").reshape(weight.shape)
            )
            for name, weight in judge.weights.items()
        }


def autoawq(python, bits, weights, inputs, scratch):
    """AutoAWQ's searches, in an environment where it can be imported."""
    given, got = Path(scratch) / "given.pt", Path(scratch) / "got.pt"
    some = {name: x[:: max(1, len(x) // AWQ_TOKENS)].clone() for name, x in inputs.items()}
    torch.save({"weights": weights, "inputs": some, "bits": bits}, given)
    subprocess.run([python, HERE / "peers.py", given, got], check=True)
    return torch.load(got)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--window", type=int, default=384)
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument("--autoawq", metavar="PYTHON")
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    torch.manual_seed(0)
    args.tokens -= args.tokens % args.window

    judge = Judge(args)
    tokens = judge.perplexity.tokens_of(args.calibration)
    results = {}
    for seed in range(args.seeds):
        skip = seed * args.tokens
        part = tokens[skip : skip + args.tokens]
        inputs = inputs_of(judge.perplexity.model, judge.layers, torch.tensor(part).reshape(-1, args.window))
        with tempfile.TemporaryDirectory() as scratch:
            stats = str(Path(scratch) / "statistics.safetensors")
            record(args.model, args.calibration, stats, args, args.tokens, skip)
            for bits in map(int, args.bits.split(",")):
                runs = dict(ours(args, judge, bits, stats, scratch))
                for act_order in (False, True):
                    name = "GPTQModel gptq" + (", desc_act" if act_order else "")
                    runs[name] = peers.gptqmodel(judge.weights, inputs, bits, act_order)
                if args.autoawq:
                    runs["AutoAWQ awq"] = autoawq(args.autoawq, bits, judge.weights, inputs, scratch)
                for name, quantized in runs.items():
                    measured = judge(quantized)
                    results.setdefault(bits, {}).setdefault(name, []).append(measured)
                    print(f"seed {seed}, int{bits}: {name}: {measured[0]:.4f}", file=sys.stderr)

        table = summary(results, judge.perplexity.float)
        if args.json:
            figures = {"float": judge.perplexity.float, "tokens": args.tokens, "seeds": seed + 1, "rows": table}
            Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    show(table, judge.perplexity.float, args)


def summary(results, float_perplexity):
    rows = []
    for bits, runs in results.items():
        rtn = runs["viva_tensor rtn"]
        for name, seeds in runs.items():
            perplexities = [p for p, _ in seeds]
            means = [statistics.mean(e.values()) for _, e in seeds]
            better = [
                sum(e[layer] < base[layer] for layer in e) for (_, e), (_, base) in zip(seeds, rtn)
            ]
            loss = rtn[0][0] - float_perplexity
            rows.append(
                {
                    "bits": bits,
                    "program": name,
                    "perplexity": statistics.mean(perplexities),
                    "spread": max(perplexities) - min(perplexities),
                    "recovered": (rtn[0][0] - statistics.mean(perplexities)) / loss,
                    "output_error": statistics.mean(means),
                    "better_than_rtn": min(better),
                    "layers": len(seeds[0][1]),
                }
            )
    return rows


def show(rows, float_perplexity, args):
    print(f"perplexity in floats: {float_perplexity:.4f}; {args.seeds} draws of {args.tokens} tokens")
    print(f"{'':6}{'':32}{'perplexity':>10} {'±':>6} {'of the loss':>12} {'output error':>13} {'better than rtn':>16}")
    for row in rows:
        share = f"{row['better_than_rtn']}/{row['layers']}"
        print(
            f"int{row['bits']:<3}{row['program']:32}{row['perplexity']:>10.4f} {row['spread'] / 2:>6.3f} "
            f"{-100 * row['recovered']:>11.0f}% {row['output_error']:>13.4f} {share:>16}"
        )
    if not args.autoawq:
        print("AutoAWQ did NOT run: no --autoawq PYTHON", file=sys.stderr)


if __name__ == "__main__":
    main()
