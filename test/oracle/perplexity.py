"""Perplexity of a causal language model in f32 arithmetic.

The text is tokenized as a whole and cut into windows; the rest is dropped. Each
window is predicted from the model's first token and its own beginning, and all of
its tokens count.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM


class Perplexity:
    def __init__(self, source, text, window, windows):
        self.tokenizer = Tokenizer.from_file(str(Path(source) / "tokenizer.json"))
        tokens = self.tokens_of(text)
        count = min(windows, len(tokens) // window)
        if count == 0:
            raise SystemExit(f"{text} has {len(tokens)} tokens, less than a window of {window}")
        self.windows = torch.tensor(tokens[: count * window]).reshape(count, window)
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        self.float = self.measure()

    def tokens_of(self, text):
        return self.tokenizer.encode(Path(text).read_text()).ids

    @torch.no_grad()
    def measure(self):
        first = torch.tensor([[self.model.config.bos_token_id]])
        losses = []
        for window in self.windows.split(1):
            logits = self.model(input_ids=torch.cat([first, window], 1)).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits[0], window[0], reduction="none"))
        return torch.cat(losses).double().mean().exp().item()

    @torch.no_grad()
    def of(self, directory):
        """With the weights that the directory dequantizes to, and the norms that it has."""
        saved = {}
        for name, value in directory.values():
            parameter = self.model.get_parameter(name)
            saved[name] = parameter.clone()
            parameter.copy_(value)
        result = self.measure()
        for name, value in saved.items():
            self.model.get_parameter(name).copy_(value)
        return result
