#!/usr/bin/env python3
"""Records what the linear layers of a transformers model meet.

    python3 examples/calibration/record.py MODEL_DIR TEXT OUT.safetensors \
        [--tokens 8192] [--window 256] [--samples 512] [--skip 0]

Writes the statistics that VivaTensor.Calibration.load/1 reads. Needs torch,
transformers and safetensors.
"""

import argparse

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


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

    def tensors(self, name):
        return {
            f"{name}.gram": self.gram,
            f"{name}.sum_abs": self.sum_abs,
            f"{name}.max_abs": self.max_abs,
            f"{name}.samples": self.rows.contiguous(),
            f"{name}.tokens": torch.tensor([self.tokens]),
        }


def windows(tokenizer, text, tokens, window, skip):
    """Windows of the text, each after the token that begins a text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][skip : skip + tokens]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    for at in range(0, len(ids), window):
        yield torch.tensor([begin + ids[at : at + window]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--skip", type=int, default=0, help="tokens to leave out first")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    seen = {}

    def record(name):
        def hook(module, inputs):
            x = inputs[0].detach()
            seen.setdefault(name, Statistics(x.shape[-1], args.samples)).add(x)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            module.register_forward_pre_hook(record(name))
    with open(args.text, encoding="utf-8") as file:
        text = file.read()
    with torch.no_grad():
        for ids in windows(tokenizer, text, args.tokens, args.window, args.skip):
            model(ids)

    tensors = {}
    for name, statistics in seen.items():
        tensors |= statistics.tensors(name)
    save_file(tensors, args.out, metadata={"samples": str(args.samples)})
    tokens = next(iter(seen.values())).tokens
    print(f"{args.out}: {len(seen)} layers, {tokens} rows each")


if __name__ == "__main__":
    main()
