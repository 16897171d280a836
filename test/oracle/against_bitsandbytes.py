"""bitsandbytes' own quantization, loading and dequantization against ours."""

import bitsandbytes
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt

from loading import check_linears, forward, load


def check(directory, findings):
    check_stored(directory, findings)
    model = load(directory, findings)
    if model is None:
        return ""
    check_linears(model, directory, findings, is_quantized)
    # Before any forward pass: it may rearrange the weights and round the scales.
    check_values(model, directory, findings)
    return check_forward(model, directory, findings)


def is_quantized(module):
    if isinstance(module, Linear4bit):
        return getattr(module.weight, "quant_state", None) is not None
    return isinstance(module, Linear8bitLt) and module.weight.SCB is not None


def check_values(model, directory, findings):
    """What bitsandbytes computes from the loaded directory."""
    # The sign of a zero of fp4 depends on which kernel takes the shape.
    signed_zeros = directory.report["recipe"]["format"] != "fp4"
    for name in directory.quantized:
        module = model.get_submodule(name.removesuffix(".weight"))
        if is_quantized(module):
            values = dequantize(module)
            findings.equal("values", name, directory.ours[name], values, signed_zeros)


def dequantize(module):
    if isinstance(module, Linear8bitLt):
        return functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    # As one long row: the AVX-512 kernel of 0.50.2 takes a wrong scale when a
    # row is a multiple of 16 but not of the block.
    state = module.weight.quant_state
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    values = functional.dequantize_4bit(module.weight.data, state).reshape(shape)
    state.shape = shape
    return values


def check_stored(directory, findings):
    """Each tensor of the files: what bitsandbytes makes of the source, or the source itself."""
    expected = set(directory.kept)
    for name in directory.quantized:
        parts = quantize(name, directory.source[name], directory.settings, directory.report["recipe"]["format"])
        expected |= set(parts)
        for part, tensor in parts.items():
            # The two zeros of the fp4 table may differ in sign.
            findings.equal("stored", part, directory.stored.get(part), tensor, not part.endswith("quant_map"))
    extra = sorted(directory.stored.names() - expected)
    findings.check("stored", not extra, f"more than expected: {extra[:3]}")


def quantize(name, weight, settings, quant_type):
    """The tensors that bitsandbytes saves for a weight."""
    if quant_type == "int8":
        module = name.removesuffix(".weight")
        made = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
        form = torch.tensor(0, dtype=torch.uint8)
        return {name: made.data, f"{module}.SCB": made.SCB, f"{module}.weight_format": form}
    # One thread, because torch cuts a long mean by threads and the mean is the nested offset.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    codes, state = functional.quantize_4bit(
        weight,
        blocksize=settings["block_size"],
        quant_type=quant_type,
        compress_statistics=settings["double_quant"],
    )
    torch.set_num_threads(threads)
    saved = state.as_dict(packed=True)
    return {name: codes} | {f"{name}.{key}": tensor for key, tensor in saved.items()}


def check_forward(model, directory, findings):
    refused = directory.report["recipe"]["format"] != "int8" and refused_shape(directory)
    try:
        finite = forward(model)
    except (AssertionError, RuntimeError) as error:
        if refused:
            return f"forward not run: this CPU's bitsandbytes kernel refuses {refused}"
        finite = findings.check("forward", False, f"{type(error).__name__}: {error}")
    else:
        findings.check("forward", finite, "NaN or infinite")
    return ""


def refused_shape(directory):
    """A shape that the kernel for AVX512-BF16 takes no 4-bit weight of, if there is one."""
    block = directory.settings["block_size"]
    for row in directory.quantized.values():
        out, columns = row["shape"]
        if out % 32 or columns % block:
            return f"{out}x{columns}"
    return None


VERSION = bitsandbytes.__version__
