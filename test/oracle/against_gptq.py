"""gptqmodel's loading of GPTQ directories, through transformers, against ours."""

import importlib.metadata
import importlib.util

import torch

from loading import check_linears, check_logits, forward, load

GPTQMODEL = importlib.util.find_spec("gptqmodel") is not None


def version():
    return importlib.metadata.version("gptqmodel") if GPTQMODEL else "not installed"


def check(directory, findings):
    expected = set(directory.kept)
    for module in directory.modules:
        expected |= {f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    different = sorted(directory.stored.names() ^ expected)
    findings.check("stored", not different, f"names that are missing or unexpected: {different[:3]}")
    if not GPTQMODEL:
        return "loading SKIPPED: gptqmodel is not installed"
    model = load(directory, findings)
    if model is None:
        return ""
    check_linears(model, directory, findings, lambda module: hasattr(module, "qweight"))
    for name in directory.quantized:
        module = model.get_submodule(name.removesuffix(".weight"))
        if hasattr(module, "qweight"):
            values = module.dequantize_weight().t()
            findings.equal("gptqmodel values", name, directory.ours[name].to(values.dtype), values)
    findings.check("forward", forward(model), "NaN or infinite")
    with torch.no_grad():
        return check_logits(directory, findings, lambda tokens: model(tokens).logits.float())
