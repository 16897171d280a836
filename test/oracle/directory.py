"""The directory that a job wrote, its source, and what the library reads from it."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}


class Tensors:
    """The tensors of all safetensors files of a directory, read when asked for."""

    def __init__(self, path):
        self.files = {}
        for file in sorted(Path(path).glob("*.safetensors")):
            opened = safe_open(file, "pt")
            self.files.update({name: opened for name in opened.keys()})

    def __getitem__(self, name):
        return self.files[name].get_tensor(name)

    def get(self, name):
        return self[name] if name in self.files else None

    def names(self):
        return set(self.files)


class Dequantized:
    """What dequantize.exs wrote."""

    def __init__(self, path):
        lines = (Path(path) / "index.tsv").read_text().splitlines()
        self.rows = {row[0]: row[1:] for row in (line.split("\t") for line in lines)}
        self.path = Path(path)

    def __getitem__(self, name):
        dtype, shape, file = self.rows[name]
        raw = bytearray((self.path / file).read_bytes())
        return torch.frombuffer(raw, dtype=DTYPES[dtype]).reshape([int(n) for n in shape.split("x")])

    def names(self):
        return set(self.rows)


class Directory:
    def __init__(self, source, path, dequantized):
        self.path = Path(path)
        self.source_path = Path(source)
        self.source = Tensors(source)
        self.stored = Tensors(path)
        self.ours = Dequantized(dequantized)
        self.report = json.loads((self.path / "report.json").read_text())
        self.config = json.loads((self.path / "config.json").read_text())
        self.settings = self.report["recipe"]["settings"]
        self.quantized = self._rows("quantize")
        self.kept = self._rows("keep")

    def _rows(self, action):
        return {row["name"]: row for row in self.report["tensors"] if row["action"] == action}

    @property
    def divided(self):
        """Names of kept vectors that the scales of the layers after them were folded into."""
        return {name for name, row in self.kept.items() if (row["reason"] or "").endswith("divided by scales")}

    def values(self):
        """What the written model computes with, where it is not the source's: by name."""
        for name in self.quantized:
            yield name, self.ours[name]
        for name in self.divided:
            yield name, self.stored[name]

    @property
    def modules(self):
        """Names of the modules whose weight is quantized."""
        return {name.removesuffix(".weight") for name in self.quantized}

    @property
    def causal(self):
        return any(name.endswith("ForCausalLM") for name in self.config.get("architectures", []))


class Findings:
    """Counts of what was compared, and what differed."""

    def __init__(self):
        self.compared = {}
        self.problems = []

    def check(self, what, good, problem):
        """Counts one comparison under `what`; `problem` says how it failed."""
        right, total = self.compared.get(what, (0, 0))
        self.compared[what] = (right + bool(good), total + 1)
        if not good:
            self.problems.append(f"{what}: {problem}")
        return good

    def equal(self, what, name, found, expected, signed_zeros=True):
        """Counts one comparison of two tensors, bit for bit."""
        self.check(what, *compare(name, found, expected, signed_zeros))

    def counts(self):
        return [f"{what} {right}/{total}" for what, (right, total) in self.compared.items()]


def compare(name, found, expected, signed_zeros):
    if found is None:
        return False, f"{name} is missing"
    if found.dtype != expected.dtype or found.shape != expected.shape:
        kinds = [f"{t.dtype} {list(t.shape)}" for t in (found, expected)]
        return False, f"{name} is {kinds[0]}, expected {kinds[1]}"
    same = found.contiguous().flatten().view(torch.uint8) == expected.contiguous().flatten().view(torch.uint8)
    same = same.reshape(found.numel(), -1).all(1)
    if not signed_zeros:
        same |= (found.flatten() == 0) & (expected.flatten() == 0)
    wrong = (~same).nonzero().flatten()
    if len(wrong) == 0:
        return True, ""
    at = wrong[0].item()
    values = found.flatten()[at].item(), expected.flatten()[at].item()
    return False, f"{name} differs in {len(wrong)} of {len(same)}, first at {at}: {values[0]!r}, expected {values[1]!r}"
