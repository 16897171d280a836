#!/usr/bin/env python3
"""Records what the linear layers of a transformers model meet.

    python3 examples/calibration/record.py MODEL_DIR TEXT OUT.safetensors \
        [--tokens 65536] [--window 256] [--samples 512] [--skip 0] [--layers RE] \
        [--rows-only]

Writes what VivaTensor.Calibration.load/1 reads: of every linear layer the sums that
the methods need and some rows, or rows alone, which are enough to measure on. Needs
torch, transformers and safetensors.
"""

import argparse
import re

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer


class Statistics:
    """Sums over the rows of activations of one layer."""

    def __init__(self, columns, samples):
        self.gram = torch.zeros(columns, columns)
        self.sum_abs = torch.zeros(columns, dtype=torch.float64)
        self.max_abs = torch.zeros(columns)
        self.rows = torch.zeros(0, columns)
        self.tokens = 0
        self.samples = samples

    def add(self, x):
        x = x.reshape(-1, x.shape[-1]).float()
        self.gram += x.T @ x
        self.sum_abs += x.abs().double().sum(0)
        self.max_abs = torch.maximum(self.max_abs, x.abs().amax(0))
        self.tokens += len(x)
        # An even draw: each row so far stays with the same chance.
        pool = torch.cat([self.rows, x])
        weight = torch.cat([torch.full([len(self.rows)], self.weight()), torch.ones(len(x))])
        chosen = (torch.rand(len(pool)) ** (1 / weight)).topk(min(self.samples, len(pool)))
        self.rows = pool[chosen.indices]

    def weight(self):
        """How many rows each kept one stands for."""
        return max(1.0, self.tokens / max(1, len(self.rows)))

    def tensors(self, name, rows_only):
        rows = {f"{name}.samples": self.rows.contiguous()}
        if rows_only:
            return rows
        return rows | {
            f"{name}.gram": self.gram,
            f"{name}.sum_abs": self.sum_abs,
            f"{name}.max_abs": self.max_abs,
            f"{name}.tokens": torch.tensor([self.tokens]),
        }


def load(directory):
    """A decoder with its output head, or an encoder as it is."""
    architecture = (AutoConfig.from_pretrained(directory).architectures or [""])[0]
    auto = AutoModelForCausalLM if architecture.endswith("ForCausalLM") else AutoModel
    return auto.from_pretrained(directory, dtype=torch.float32).eval()


def windows(tokenizer, config, text, tokens, window, skip):
    """Windows of the text, each between the tokens that a text begins and ends with."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][skip : skip + tokens]
    encoder = tokenizer.cls_token_id is not None
    first = tokenizer.cls_token_id if encoder else tokenizer.bos_token_id
    if first is None:
        first = config.bos_token_id
    begin = [first] if first is not None else []
    end = [tokenizer.sep_token_id] if encoder else []
    for at in range(0, len(ids), window):
        yield torch.tensor([begin + ids[at : at + window] + end])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--skip", type=int, default=0, help="tokens to leave out first")
    parser.add_argument("--layers", default="", help="a regular expression for their names")
    parser.add_argument("--rows-only", action="store_true", help="no sums: to measure on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load(args.model)
    head = model.get_output_embeddings()
    seen = {}

    def record(name):
        def hook(module, inputs):
            x = inputs[0].detach()
            seen.setdefault(name, Statistics(x.shape[-1], args.samples)).add(x)

        return hook

    for name, module in model.named_modules():
        linear = isinstance(module, torch.nn.Linear) and module is not head
        if linear and re.search(args.layers, name):
            module.register_forward_pre_hook(record(name))
    with open(args.text, encoding="utf-8") as file:
        text = file.read()
    with torch.no_grad():
        for ids in windows(tokenizer, model.config, text, args.tokens, args.window, args.skip):
            model(ids)

    tensors = {}
    for name, statistics in seen.items():
        tensors |= statistics.tensors(name, args.rows_only)
    save_file(tensors, args.out, metadata={"samples": str(args.samples)})
    tokens = next(iter(seen.values())).tokens
    print(f"{args.out}: {len(seen)} layers, {tokens} rows each")


if __name__ == "__main__":
    main()
