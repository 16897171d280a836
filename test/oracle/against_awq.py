"""AWQ GEMM as it is documented, in numpy, and gptqmodel where it is installed."""

import importlib.metadata
import importlib.util

import numpy
import torch

from loading import check_linears, check_logits, forward, load

# Output column of each nibble of a word, from its low end.
COLUMN = [0, 2, 4, 6, 1, 3, 5, 7]

GPTQMODEL = importlib.util.find_spec("gptqmodel") is not None


def version():
    return importlib.metadata.version("gptqmodel") if GPTQMODEL else "not installed"


def check(directory, findings):
    for name in directory.quantized:
        parts = unpack(directory.stored, name.removesuffix(".weight"))
        values = torch.from_numpy(dequantize(*parts))
        findings.equal("values", name, directory.ours[name], values)
        # Codes that were chosen by activations are no one else's.
        if directory.settings["method"] != "rtn":
            continue
        group = parts[0].shape[1] // parts[1].shape[1]
        made = quantize(directory.source[name], group)
        for kind, found, expected in zip(("codes", "zeros", "scales"), parts, made):
            findings.equal("stored", f"{name} {kind}", torch.from_numpy(found), torch.from_numpy(expected))
    check_names(directory, findings)
    if not GPTQMODEL:
        return "loading SKIPPED: gptqmodel is not installed"
    model = load(directory, findings)
    if model is not None:
        check_linears(model, directory, findings, lambda module: hasattr(module, "qweight"))
        check_loaded(model, directory, findings)
        findings.check("forward", forward(model), "NaN or infinite")
    if model is None or not directory.causal:
        return ""
    with torch.no_grad():
        return check_logits(directory, findings, lambda tokens: model(tokens).logits.float())


def check_names(directory, findings):
    expected = set(directory.kept)
    for module in directory.modules:
        expected |= {f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    different = sorted(directory.stored.names() ^ expected)
    findings.check("stored", not different, f"names that are missing or unexpected: {different[:3]}")


def unpack(stored, module):
    """Codes and zero points [out, …] as f32, scales [out, groups] as f16."""
    qweight, qzeros, scales = (stored[f"{module}.{part}"].numpy() for part in ("qweight", "qzeros", "scales"))
    return unpack_words(qweight), unpack_words(qzeros), numpy.ascontiguousarray(scales.T)


def unpack_words(words):
    rows, columns = words.shape
    nibbles = numpy.empty((rows, columns, 8), numpy.float32)
    for i, column in enumerate(COLUMN):
        nibbles[:, :, column] = (words.view(numpy.uint32) >> numpy.uint32(4 * i)) & 15
    return numpy.ascontiguousarray(nibbles.reshape(rows, columns * 8).T)


def dequantize(codes, zeros, scales):
    group = codes.shape[1] // zeros.shape[1]
    zeros, scales = (numpy.repeat(part.astype(numpy.float32), group, axis=1) for part in (zeros, scales))
    # A difference of integers times an f16 scale is exact in f32: one rounding.
    return ((codes - zeros) * scales).astype(numpy.float16)


def quantize(weight, group):
    """Round to nearest in f32, on the scale as it is stored; zero is in every range."""
    groups = weight.float().numpy().reshape(weight.shape[0], -1, group)
    low = numpy.minimum(groups.min(axis=2), 0)
    high = numpy.maximum(groups.max(axis=2), 0)
    scales = ((high - low) / numpy.float32(15)).astype(numpy.float16)
    stored = scales.astype(numpy.float32)
    step = numpy.where(stored > 0, stored, numpy.float32(1))
    zeros = numpy.clip(numpy.rint(-low / step), 0, 15)
    codes = numpy.clip(numpy.rint(groups / step[:, :, None]) + zeros[:, :, None], 0, 15)
    return codes.reshape(weight.shape), zeros, scales


def check_loaded(model, directory, findings):
    """What gptqmodel computes from the loaded directory."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    for name in directory.quantized:
        module = model.get_submodule(name.removesuffix(".weight"))
        if not hasattr(module, "qweight"):
            continue
        group = module.qweight.shape[0] // module.scales.shape[0]
        values = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, group).t()
        findings.equal("gptqmodel values", name, directory.ours[name], values)
