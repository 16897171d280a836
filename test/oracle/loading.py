"""Loads a directory in transformers, as its user would, and runs it."""

import torch
from transformers import AutoModel, AutoModelForCausalLM


def load(directory, findings):
    """The model, or None; with no argument but the path."""
    auto = AutoModelForCausalLM if directory.causal else AutoModel
    try:
        model, info = auto.from_pretrained(directory.path, output_loading_info=True)
    except Exception as error:
        findings.check("loads", False, f"{type(error).__name__}: {error}")
        return None
    left = {key: value for key, value in info.items() if value}
    findings.check("loads", not left, f"left over: {left}")
    return model


def check_linears(model, directory, findings, is_quantized):
    """Holds each linear module to the report: quantized, or plain."""
    expected = directory.modules
    seen = set()
    for name, module in model.named_modules():
        quantized = is_quantized(module)
        if not quantized and not isinstance(module, torch.nn.Linear):
            continue
        seen.add(name)
        if name in expected:
            findings.check("linears", quantized, f"{name} is {type(module).__name__}, the report says quantized")
        else:
            plain = type(module) is torch.nn.Linear and module.weight.is_floating_point()
            findings.check("linears", plain, f"{name} is {type(module).__name__}, the report says kept")
    for name in sorted(expected - seen):
        findings.check("linears", False, f"the model has no linear module {name}")


@torch.no_grad()
def forward(model):
    """Whether all outputs for a few tokens are finite."""
    tokens = torch.arange(1, 17).reshape(1, -1) % model.config.vocab_size
    return bool(model(input_ids=tokens)[0].isfinite().all())


@torch.no_grad()
def check_logits(directory, findings, logits_of):
    """Holds a program's logits to those of the float model with our dequantized
    weights, within 2 % of the largest: programs round activations to 16 bits."""
    model = AutoModelForCausalLM.from_pretrained(directory.source_path, dtype=torch.float32)
    for name, value in directory.values():
        model.get_parameter(name).copy_(value.float())
    tokens = (torch.arange(48).reshape(2, 24) * 37 + 1) % model.config.vocab_size
    expected = model(tokens).logits
    off = (logits_of(tokens) - expected).abs().max() / expected.abs().max()
    findings.check("logits", off < 0.02, f"{off:.4f} of the largest off")
    return f"logits within {off:.1e} of the largest"
