"""GPTQModel's and AutoAWQ's own code, one layer at a time.

As a program it runs AutoAWQ: peers.py GIVEN GOT, both torch files.
"""

import sys

import torch

def linear(weight):
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight.clone()
    module.weight.requires_grad_(False)
    return module


def gptqmodel(weights, inputs, bits, act_order):
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    back = {}
    for name, weight in weights.items():
        config = QuantizeConfig(bits=bits, group_size=128, sym=False, desc_act=act_order, device="cpu")
        gptq = GPTQ(linear(weight), config)
        gptq.quantizer.configure(perchannel=True)
        gptq.add_batch(inputs[name][None], None)
        back[name] = gptq.quantize()[0].float()
    return back


def autoawq(weights, inputs, bits):
    from awq.quantize.quantizer import AwqQuantizer

    awq = AwqQuantizer.__new__(AwqQuantizer)
    awq.w_bit, awq.group_size, awq.zero_point, awq.duo_scaling = bits, 128, True, True
    awq.max_chunk_memory = 1 << 30
    # One layer at a time has nothing to hand to a module but x.
    awq._sanitize_kwargs = lambda kwargs, module: {}
    awq._module_forward = lambda x, module, kwargs: module(x)

    back = {}
    for name, weight in weights.items():
        module, x = linear(weight), inputs[name]
        x = x[None]
        relative = weight.view(-1, 128).abs()
        relative = relative / (relative.amax(1, keepdim=True) + 1e-6)
        scale = awq._compute_best_scale(
            x, relative.view_as(weight).mean(0), x.abs().mean((0, 1)), module, [module], module(x)
        )
        scaled = weight * scale
        if not any(part in name for part in ["q_", "k_"]):
            limit = awq._compute_best_clip(scaled, x / scale)
            groups = scaled.view(len(weight), -1, 128)
            scaled = torch.clamp(groups, -limit.view(len(weight), -1, 1), limit.view(len(weight), -1, 1))
            scaled = scaled.view_as(weight)
        back[name] = awq.pseudo_quantize_tensor(scaled)[0] / scale
    return back


if __name__ == "__main__":
    given = torch.load(sys.argv[1])
    with torch.no_grad():
        torch.save(autoawq(given["weights"], given["inputs"], given["bits"]), sys.argv[2])
