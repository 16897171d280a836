#!/usr/bin/env python3
"""Quantize, dequantize and multiply: viva_tensor beside other programs and beside
what the machine can do, in one run on the same data.

    python3 bench/peers/ops.py --venv DIR [--threads 1 2] [--rows REGEX] [--json]

A repeat asks every program in turn, and for the limit, so that a slow minute of the
machine slows all of them; the table has the medians. README.md says more.
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import venv

import rows
from results import ROOT, machine, versions, write_result

HERE = pathlib.Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements-ops.txt"
COLUMNS, TOKENS = 4096, 512
OURS = ROOT / "target/release/examples/ops"
# Built apart from what plain cargo builds there: candle chooses its kernels when it
# is compiled.
CANDLE = HERE / "candle/target/native"
PACKAGES = ("numpy", "torch", "bitsandbytes", "onnxruntime", "openvino", "libgguf")


def main():
    arguments = parsed()
    os.environ["PYTHONWARNINGS"] = "ignore"
    inside(arguments.venv)
    if not arguments.no_build:
        build(arguments.peers)
    # Ours gives way to everything else on the machine; peers then have to as well.
    os.nice(15)
    chosen = [row for row in rows.ROWS if re.search(arguments.rows, row.name)]
    if not chosen:
        sys.exit(f"no row matches {arguments.rows!r}; there are\n" + "\n".join(r.name for r in rows.ROWS))
    results, skipped = [], {}
    with tempfile.TemporaryDirectory() as directory:
        data = write_data(pathlib.Path(directory))
        for threads in arguments.threads:
            programs = Programs(threads, data, arguments.peers)
            results += measure(programs, chosen, threads, arguments)
            skipped.update(programs.close())
    print(table(results))
    for name, reason in sorted(skipped.items()):
        print(f"SKIPPED {name}: {reason}")
    if arguments.json:
        write_result(
            "ops.json",
            {
                "command": command(arguments),
                "weight": [COLUMNS, COLUMNS],
                "machine": machine(),
                "versions": installed(),
                "rows": results,
                "skipped": skipped,
            },
        )


def command(arguments):
    """What makes the same rows, wherever the virtual environment is."""
    threads = " ".join(map(str, arguments.threads))
    rows = f" --rows {shlex.quote(arguments.rows)}" if arguments.rows else ""
    how = f"--repeats {arguments.repeats} --budget {arguments.budget:g} --threads {threads}"
    return f"python3 bench/peers/ops.py {how}{rows} --json"


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--venv", help="a virtual environment; made, with what is to be installed, if absent")
    parser.add_argument("--peers", nargs="*", default=list(rows.PEERS), choices=rows.PEERS)
    parser.add_argument("--rows", default="", help="a regular expression that finds the rows to run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--budget", type=float, default=0.2, help="seconds for each figure in each repeat")
    parser.add_argument("--no-build", action="store_true", help="run the binaries that are there")
    parser.add_argument("--json", action="store_true", help="also write bench/results/ops.json")
    return parser.parse_args()


def inside(directory):
    """Goes on in the virtual environment, made where there is none."""
    if directory is None:
        return
    python = pathlib.Path(directory).resolve() / "bin/python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-r", REQUIREMENTS], check=True, stdout=sys.stderr)
    if pathlib.Path(sys.prefix).resolve() != python.parent.parent:
        os.execv(python, [str(python), *sys.argv])


def build(peers):
    cargo = ["cargo", "build", "--release", "--locked"]
    subprocess.run([*cargo, "-p", "viva_core", "--example", "ops"], cwd=ROOT, check=True)
    if "candle" in peers:
        done = subprocess.run(
            [*cargo, "--target-dir", CANDLE],
            cwd=HERE / "candle",
            env={**os.environ, "RUSTFLAGS": "-C target-cpu=native"},
        )
        if done.returncode != 0:
            print("candle does not build: it is skipped", file=sys.stderr)


def write_data(directory):
    """A weight of normal numbers and tokens of activations, as files."""
    import numpy

    random = numpy.random.default_rng(1)
    paths = directory / "weight.f32", directory / "activations.f32"
    (random.standard_normal((COLUMNS, COLUMNS), dtype=numpy.float32) * 0.02).tofile(paths[0])
    random.standard_normal((TOKENS, COLUMNS), dtype=numpy.float32).tofile(paths[1])
    return [str(COLUMNS), *map(str, paths)]


class Programs:
    """The programs, each a process that answers requests; started when first asked."""

    def __init__(self, threads, data, peers):
        self.peers, self.running, self.dead = peers, {}, {}
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "RAYON_NUM_THREADS": str(threads),
        }
        self.commands = {
            "ours": [OURS, str(threads), *data],
            "candle": [CANDLE / "release/candle_peer", *data],
        }
        for peer in rows.PEERS:
            script = HERE / f"programs/with_{peer}.py"
            self.commands.setdefault(peer, [sys.executable, script, *data])

    def ask(self, name, request):
        """What the program answers, or None where it cannot."""
        if name in self.dead or not (name == "ours" or name in self.peers):
            return None
        try:
            program = self.running.get(name) or self.start(name)
            program.stdin.write(json.dumps(request) + "\n")
            program.stdin.flush()
            line = program.stdout.readline()
        except OSError as error:
            return self.skip(name, str(error))
        if not line:
            program.errors.seek(0)
            said = program.errors.read().strip().splitlines() or [f"exit status {program.wait()}"]
            return self.skip(name, said[-1])
        answer = json.loads(line)
        # Threads of some programs spin for a while before they sleep.
        time.sleep(0.01)
        if "absent" in answer:
            print(f"{name} cannot {request}: {answer['absent']}", file=sys.stderr)
            return None
        return answer

    def start(self, name):
        errors = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        program = subprocess.Popen(
            self.commands[name], stdin=pipe, stdout=pipe, stderr=errors, text=True, env=self.environment
        )
        program.errors = errors
        self.running[name] = program
        return program

    def skip(self, name, reason):
        self.dead[name] = reason
        print(f"SKIPPED from here on: {name}: {reason}", file=sys.stderr)

    def close(self):
        for program in self.running.values():
            program.stdin.close()
            program.wait()
        absent = {peer: "not asked for" for peer in rows.PEERS if peer not in self.peers}
        return {**absent, **self.dead}


def measure(programs, chosen, threads, arguments):
    figures, errors = {}, {}
    for repeat in range(arguments.repeats):
        for row in chosen:
            print(f"threads {threads}, repeat {repeat + 1}: {row.name}", file=sys.stderr)
            for who, request in contenders(row):
                request = {**request, "budget": arguments.budget, "error": repeat == 0}
                answer = programs.ask(who[0], request)
                if answer:
                    figures.setdefault((row.name, who), []).append(answer["work"] / answer["seconds"] / 1e9)
                    if answer.get("error") is not None:
                        errors[row.name, who] = answer["error"]
    return [result(row, threads, figures, errors) for row in chosen]


def contenders(row):
    """Who is asked what: the limit, ours, the peers."""
    yield ("ours", row.limit), {"op": "limit", "name": row.limit}
    yield ("ours", "ours"), {"op": row.op, **row.shape, **row.ours}
    for peer, format in row.peers:
        yield (peer, format), {"op": row.op, **row.shape, "format": format}


def result(row, threads, figures, errors):
    def of(*who):
        values = figures.get((row.name, who))
        return {"figure": statistics.median(values) if values else None, "error": errors.get((row.name, who))}

    ours, limit = of("ours", "ours"), of("ours", row.limit)["figure"]
    peers = {f"{peer} {format}": of(peer, format) for peer, format in row.peers}
    there = [name for name, peer in peers.items() if peer["figure"]]
    best = max(there, key=lambda name: peers[name]["figure"], default=None)
    return {
        "operation": row.name,
        "threads": threads,
        "unit": "GB/s" if row.limit in rows.MEMORY else "GOP/s",
        "ours": ours,
        "limit": {"name": row.limit, "figure": limit},
        "best_peer": best,
        "peers": peers,
        "of_limit": ratio(ours["figure"], limit),
        "of_best_peer": ratio(ours["figure"], peers[best]["figure"]) if best else None,
    }


def ratio(a, b):
    return a / b if a and b else None


def table(results):
    titles = ["operation", "thr", "best peer", "peer", "ours", "limit", "unit", "of limit", "of peer"]
    titles += ["peer's error", "our error"]
    lines = [titles]
    for r in results:
        best = r["peers"].get(r["best_peer"], {"figure": None, "error": None})
        figures = [number(f, 3) for f in (best["figure"], r["ours"]["figure"], r["limit"]["figure"])]
        ratios = [number(r["of_limit"], 2), number(r["of_best_peer"], 3)]
        off = [f"{e:.1e}" if e is not None else "-" for e in (best["error"], r["ours"]["error"])]
        name = r["best_peer"] or "skipped"
        lines.append([r["operation"], str(r["threads"]), name, *figures, r["unit"], *ratios, *off])
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    left = {0, 2}
    padded = [
        [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def number(value, digits):
    """To so many significant digits."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def installed():
    lock = (HERE / "candle/Cargo.lock").read_text()
    candle = re.search(r'name = "candle-core"\nversion = "(.*)"', lock).group(1)
    commit = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    ours = subprocess.run(commit, capture_output=True, text=True).stdout.strip()
    return {**versions(*PACKAGES), "candle-core": candle, "viva_tensor": ours}


if __name__ == "__main__":
    main()
