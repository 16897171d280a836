"""mlx-lm's loading of MLX directories against ours."""

import importlib.metadata
import importlib.util

import torch

from loading import check_logits

MLX = importlib.util.find_spec("mlx_lm") is not None


def version():
    return importlib.metadata.version("mlx") if MLX else "not installed"


def check(directory, findings):
    if not MLX:
        return "SKIPPED: mlx-lm is not installed"
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import load_model

    def torch_of(array):
        # numpy has no bf16; f32 holds it.
        return torch.tensor(array.astype(mx.float32).tolist())

    model, _ = load_model(directory.path)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.QuantizedLinear)}
    same = modules.keys() == directory.modules
    findings.check("linears", same, f"other modules are quantized: {sorted(modules.keys() ^ directory.modules)[:3]}")
    for name, module in modules.items():
        # In f32, where a code times its scale is not rounded before the bias is added.
        scales, biases = (part.astype(mx.float32) for part in (module.scales, module.biases))
        values = mx.dequantize(module.weight, scales, biases, module.group_size, module.bits)
        findings.equal("mlx values", name, directory.ours[f"{name}.weight"], torch_of(values), False)
    model.set_dtype(mx.float32)
    return check_logits(directory, findings, lambda tokens: torch_of(model(mx.array(tokens.tolist()))))
