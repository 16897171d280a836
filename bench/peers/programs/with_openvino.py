"""OpenVINO: weights of 4 bits with zero points, as its weight compression stores
them; products in int8, activations scaled by group as they come, or in bf16."""

import numpy
import openvino
from openvino import Type, opset13

from peer import THREADS, serve

CORE = openvino.Core()


class Groups4:
    def __init__(self, group, precision):
        self.group = group
        self.settings = {
            "INFERENCE_NUM_THREADS": THREADS,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": group if precision == "int8" else 0,
        }

    def quantize(self, w):
        groups = w.reshape(len(w), -1, self.group)
        low = numpy.minimum(groups.min(-1, keepdims=True), 0)
        high = numpy.maximum(groups.max(-1, keepdims=True), 0)
        scale = numpy.maximum((high - low) / 15, 1e-7).astype(numpy.float16)
        zero = numpy.rint(-low / scale).clip(0, 15).astype(numpy.uint8)
        codes = (numpy.rint(groups / scale) + zero).clip(0, 15).astype(numpy.uint8)
        return codes, scale, zero

    def values(self, q):
        codes, scale, zero = q
        return (codes.astype(numpy.float32) - zero) * scale.astype(numpy.float32)

    def nbytes(self, q):
        codes, scale, zero = q
        return codes.size // 2 + scale.nbytes + zero.size // 2

    def layer(self, q):
        codes, scale, zero = q
        n, k = len(codes), codes[0].size
        four = [opset13.convert(nibbles(part), Type.f16) for part in (codes, zero)]
        groups = opset13.multiply(opset13.subtract(*four), opset13.constant(scale))
        shape = opset13.constant(numpy.array([n, k]))
        w = opset13.convert(opset13.reshape(groups, shape, False), Type.f32)
        x = opset13.parameter([-1, k], Type.f32)
        model = openvino.Model([opset13.matmul(x, w, False, True)], [x])
        request = CORE.compile_model(model, "CPU", self.settings).create_infer_request()

        def run(x):
            request.infer([x], share_inputs=True)
            return request.get_output_tensor().data

        return run

    def activations(self, x):
        return x


def nibbles(codes):
    """The first of two in the low half of a byte."""
    packed = codes.reshape(-1, 2)
    tensor = openvino.Tensor(numpy.ascontiguousarray(packed[:, 0] | packed[:, 1] << 4), list(codes.shape), Type.u4)
    return opset13.constant(tensor, shared_memory=False)


serve(
    {
        "u4 g128, int8": Groups4(128, "int8"),
        "u4 g32, int8": Groups4(32, "int8"),
        "u4 g128, bf16": Groups4(128, "bf16"),
    },
    lambda array, dtype: array,
)
