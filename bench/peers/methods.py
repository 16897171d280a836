#!/usr/bin/env python3
"""GPTQ, AWQ and HQQ of one 4096 x 4096 weight: plain torch and the hqq package
beside viva_tensor, one after the other in one run.

    python bench/peers/methods.py --ours target/release/examples/methods [--json]

A repeat runs every program once, so that a slow minute of the machine slows all
of them; the table has the medians. Errors are those of the layer's output on
tokens that no method saw, relative to the output. README.md says what to install.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

import torch
from hqq.core.quantize import Quantizer

from results import machine, versions, write_result

SIZE, TOKENS, GROUP, LEVELS = 4096, 512, 128, 15
POINTS, CLIPS = 20, 10
CLIPPED_ROWS = 256


def layer(seed):
    """A weight of normal numbers, and correlated tokens whose channels differ in
    strength, a few of them by far: as in the layers of a language model."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((SIZE, SIZE), generator=generator) * 0.02
    strength = torch.exp(torch.randn(SIZE, generator=generator) * 0.8)
    strength[torch.randperm(SIZE, generator=generator)[:8]] *= 20
    shared = torch.randn((40, SIZE), generator=generator)
    tokens = torch.randn((2 * TOKENS, SIZE), generator=generator)
    tokens = (tokens + 0.3 * torch.randn((2 * TOKENS, 40), generator=generator) @ shared) * strength
    return weight, tokens[:TOKENS].contiguous(), tokens[TOKENS:].contiguous()


def parameters(blocks):
    """Scale and zero point of blocks [..., length]: 4 bits that reach zero."""
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    high = blocks.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / LEVELS).clamp(min=1e-8)
    return scale, torch.round(-low / scale)


def rounded(values, scale, zero):
    return (torch.clamp(torch.round(values / scale) + zero, 0, LEVELS) - zero) * scale


def round_trip(weight):
    blocks = weight.reshape(-1, GROUP)
    return rounded(blocks, *parameters(blocks)).reshape(weight.shape)


def gptq(weight, tokens, step=128):
    """As in the paper: the Cholesky factor of the inverse of the damped Hessian,
    columns by falling activation in blocks of 128. Groups are those of the
    weights as they stand, so that files need no order of columns."""
    hessian = tokens.T @ tokens * (2 / len(tokens))
    scale, zero = parameters(weight.reshape(SIZE, -1, GROUP))
    order = torch.argsort(torch.diagonal(hessian), descending=True)
    hessian = hessian[order][:, order]
    hessian.diagonal().add_(0.01 * torch.diagonal(hessian).mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, result = weight[:, order].clone(), torch.empty_like(weight)
    for first in range(0, SIZE, step):
        last = first + step
        block, square = left[:, first:last].clone(), factor[first:last, first:last]
        errors = torch.empty_like(block)
        for i in range(step):
            group = order[first + i] // GROUP
            value = rounded(block[:, i], scale[:, group, 0], zero[:, group, 0])
            result[:, first + i] = value
            errors[:, i] = (block[:, i] - value) / square[i, i]
            block[:, i:] -= torch.outer(errors[:, i], square[i, i:])
        left[:, last:] -= errors @ factor[first:last, last:]
    return result[:, torch.argsort(order)]


def awq(weight, tokens):
    """The search for the scale of columns: twenty exponents, each judged by the
    output on all tokens."""
    mean, output = tokens.abs().mean(0), tokens @ weight.T
    best = (float("inf"), None)
    for point in range(POINTS):
        scale = mean.pow(point / POINTS).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        values = round_trip(weight * scale) / scale
        loss = (output - tokens @ values.T).square().mean().item()
        if loss < best[0]:
            best = (loss, scale)
    return round_trip(weight * best[1]) / best[1]


def awq_clip(weight, tokens, batch=16):
    """The search for the clipping of groups, by the sums that each makes of each
    token. Takes minutes for all rows: called with some of them."""
    tokens = tokens.reshape(1, TOKENS, -1, GROUP)
    parts = []
    for rows in weight.split(batch):
        rows = rows.reshape(len(rows), 1, -1, GROUP)
        most = rows.abs().amax(-1, keepdim=True)
        output = (tokens * rows).sum(-1)
        best, chosen = torch.full_like(most, float("inf")), most.clone()
        for step in range(CLIPS):
            limit = most * (1 - step / 20)
            clipped = torch.clamp(rows, -limit, limit)
            values = rounded(clipped, *parameters(clipped))
            loss = ((tokens * values).sum(-1) - output).square().mean(1).reshape(best.shape)
            better = loss < best
            best, chosen = torch.where(better, loss, best), torch.where(better, limit, chosen)
        parts.append(torch.clamp(rows, -chosen, chosen).reshape(-1, SIZE))
    return round_trip(torch.cat(parts))


def hqq(weight, _tokens):
    codes, meta = Quantizer.quantize(weight, nbits=4, group_size=64, axis=1, device="cpu", bitpack=True)
    return lambda: Quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32}).float()


# What ours calls it: the peer, its function, and how many rows it takes.
METHODS = {
    "gptq": ("GPTQ int4 g128, plain torch", gptq, SIZE),
    "awq": ("AWQ scale search, 20 points, plain torch", awq, SIZE),
    "clip": ("AWQ clip search, plain torch", awq_clip, CLIPPED_ROWS),
    "hqq": ("HQQ 4-bit g64, the hqq package", hqq, SIZE),
}


def output_error(weight, values, tokens):
    """Of as many rows as there are values of."""
    output = tokens @ weight[: len(values)].T
    return ((output - tokens @ values.T).norm() / output.norm()).item()


def run_ours(binary, method, threads, directory):
    out = directory / "values.f32"
    paths = [directory / "weight.f32", directory / "tokens.f32", out]
    command = [binary, method, str(SIZE), str(threads), *map(str, paths)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    values = torch.from_file(str(out), size=SIZE * SIZE, dtype=torch.float32).reshape(SIZE, SIZE)
    return float(done.stdout), values


def measure(arguments, directory):
    weight, tokens, unseen = layer(1)
    weight.numpy().tofile(directory / "weight.f32")
    tokens.numpy().tofile(directory / "tokens.f32")
    seconds = {(method, who): [] for method in METHODS for who in ("peer", "ours")}
    rows = {}
    for repeat in range(arguments.repeats):
        for method, (title, function, count) in METHODS.items():
            start = time.perf_counter()
            values = function(weight[:count], tokens)
            seconds[method, "peer"].append((time.perf_counter() - start) * SIZE / count)
            took, our_values = run_ours(arguments.ours, method, arguments.threads, directory)
            seconds[method, "ours"].append(took)
            if repeat == 0:
                values = values() if callable(values) else values
                rows[method] = {
                    "peer": title + (f", from {count} of {SIZE} rows" if count < SIZE else ""),
                    "peer_output_error": output_error(weight, values.reshape(count, SIZE), unseen),
                    "our_output_error": output_error(weight, our_values[:count], unseen),
                }
    for method, row in rows.items():
        row["peer_seconds"] = statistics.median(seconds[method, "peer"])
        row["our_seconds"] = statistics.median(seconds[method, "ours"])
        row["ratio"] = row["peer_seconds"] / row["our_seconds"]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ours", required=True, help="the example `methods` of viva_core")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="also write bench/results/methods.json")
    arguments = parser.parse_args()
    # Ours gives way to everything else on the machine; peers then have to as well.
    os.nice(15)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        rows = measure(arguments, pathlib.Path(directory))
    print(f"{'peer':58} {'s':>8} {'ours, s':>8} {'ratio':>6} {'error':>8} {'ours':>8}")
    for row in rows.values():
        times = f"{row['peer_seconds']:8.2f} {row['our_seconds']:8.2f} {row['ratio']:5.1f}x"
        print(f"{row['peer']:58} {times} {row['peer_output_error']:8.5f} {row['our_output_error']:8.5f}")
    if arguments.json:
        result = {
            "command": "python bench/peers/methods.py --json",
            "weight": [SIZE, SIZE],
            "tokens": TOKENS,
            "threads": arguments.threads,
            "repeats": arguments.repeats,
            "machine": machine(),
            "versions": versions("torch", "hqq"),
            "methods": rows,
        }
        write_result("methods.json", result)


if __name__ == "__main__":
    main()
