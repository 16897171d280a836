"""compressed-tensors' own decompression, and transformers' loading, against ours."""

import importlib.metadata

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from loading import check_linears, forward, load


def check(directory, findings):
    config = QuantizationConfig.model_validate(directory.config["quantization_config"])
    check_names(directory, config, findings)
    check_stored(directory, config, findings)
    check_values(directory, config, findings)
    model = load(directory, findings)
    if model is None:
        return ""
    check_linears(model, directory, findings, is_quantized)
    # The first forward pass decompresses the weights.
    findings.check("forward", forward(model), "NaN or infinite")
    check_loaded(model, directory, findings)
    return ""


def is_quantized(module):
    return getattr(module, "quantization_scheme", None) is not None


def scheme_of(config):
    (scheme,) = config.config_groups.values()
    return scheme, BaseCompressor.get_value_from_registry(scheme.format)


def check_names(directory, config, findings):
    scheme, compressor = scheme_of(config)
    expected = set(directory.kept)
    for module in directory.modules:
        expected |= {f"{module}.{part}" for part in compressor.compression_param_names(scheme)}
    if scheme.format == "mxfp4-pack-quantized":
        # It has no activation scales where activations stay as they are.
        expected = {name for name in expected if not name.endswith("input_global_scale")}
    different = sorted(directory.stored.names() ^ expected)
    findings.check("stored", not different, f"names that are missing or unexpected: {different[:3]}")


def check_stored(directory, config, findings):
    """The tensors in the files, with what the compressor makes of the source."""
    scheme, compressor = scheme_of(config)
    by_rule = directory.settings["method"] == "rtn" and scheme.weights.symmetric
    # int8 takes its scale from the largest magnitude over 127, not over 127.5.
    if not by_rule or directory.report["recipe"]["format"] == "int8":
        return
    for name in directory.quantized:
        module = name.removesuffix(".weight")
        made = quantize(directory.source[name].float(), scheme, compressor, directory.stored[f"{module}.weight_scale"])
        for part, tensor in made.items():
            findings.equal("stored", f"{module}.{part}", directory.stored.get(f"{module}.{part}"), tensor)


def quantize(weight, scheme, compressor, stored_scale):
    """The tensors of a weight, quantized in f32 under a scale that is rounded to the dtype that is stored."""
    args = scheme.weights
    state = {"weight": weight}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    groups = weight.reshape(weight.shape[0], -1, args.group_size or weight.shape[1])
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, state.get("weight_global_scale"))
    if stored_scale.dtype in (torch.float32, torch.bfloat16):
        state["weight_scale"] = scale.to(stored_scale.dtype).float()
        made = compressor.compress(state, scheme)
        return made | {"weight_scale": made["weight_scale"].to(stored_scale.dtype)}
    return compressor.compress(state | {"weight_scale": scale}, scheme)


def check_values(directory, config, findings):
    """What the compressor makes of the tensors in the files."""
    scheme, compressor = scheme_of(config)
    for name in directory.quantized:
        module = name.removesuffix(".weight")
        names = [n for n in directory.stored.names() if n.rpartition(".")[0] == module and not n.endswith(".bias")]
        state = {n.rpartition(".")[2]: directory.stored[n] for n in names}
        values = compressor.decompress(state, scheme)["weight"]
        findings.equal("values", name, directory.ours[name].to(values.dtype), values, False)


def check_loaded(model, directory, findings):
    """The weights of the loaded model, in the dtype that it computes in."""
    for name in directory.quantized:
        weight = model.get_parameter(name).detach()
        findings.equal("loaded values", name, directory.ours[name].to(weight.dtype), weight, False)


VERSION = importlib.metadata.version("compressed-tensors")
