"""onnxruntime: MatMulNBits with 4 bits, int8 with activations scaled as they come,
and floats; its quantizers in C++."""

import numpy
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import _pybind_state as native

from peer import THREADS, Unquantized, serve


def session(node, weights):
    """A model of one node from x to y, whose other inputs are these arrays."""
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in "xy"]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "product", floats[:1], floats[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda x: made.run(None, {"x": x})[0]


class Format:
    def activations(self, x):
        return x


class Blocks4(Format):
    """Symmetric. Products with activations in 8 bits (`level` 4), or in f32 (1)."""

    def __init__(self, block, level):
        self.block, self.level = block, level

    def quantize(self, w):
        n, k = w.shape
        codes = numpy.zeros((n, k // self.block, self.block // 2), numpy.uint8)
        scales = numpy.zeros(n * k // self.block, numpy.float32)
        zeros = numpy.zeros(n * (k // self.block + 1) // 2, numpy.uint8)
        native.quantize_matmul_4bits(codes, w.T, scales, zeros, self.block, n, k, True)
        return codes, scales

    def values(self, q):
        codes, scales = q
        both = numpy.stack([codes & 15, codes >> 4], -1).reshape(len(scales), self.block)
        return (both.astype(numpy.float32) - 8) * scales[:, None]

    def nbytes(self, q):
        return sum(part.nbytes for part in q)

    def layer(self, q):
        codes, scales = q
        n, blocks, _ = codes.shape
        node = helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scales"],
            ["y"],
            domain="com.microsoft",
            N=n,
            K=blocks * self.block,
            bits=4,
            block_size=self.block,
            accuracy_level=self.level,
        )
        return session(node, {"codes": codes, "scales": scales})


class Nf4(Format):
    """Blocks of 64, of columns."""

    def quantize(self, w):
        n, k = w.shape
        codes = numpy.zeros(n * k // 2, numpy.uint8)
        scales = numpy.zeros(n * k // 64, numpy.float32)
        native.quantize_matmul_bnb4(codes, w.T, scales, 64, 1, n, k)
        return codes, scales, n

    def values(self, q):
        codes, scales, n = q
        both = numpy.stack([codes >> 4, codes & 15], -1).reshape(len(scales), 64)
        return (NF4[both] * scales[:, None]).reshape(-1, n).T


# Quantiles of a normal distribution, as bitsandbytes has them.
NF4 = numpy.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    numpy.float32,
)


class Int8(Format):
    """One scale a row for weights, one a tensor for activations."""

    def quantize(self, w):
        scales = numpy.abs(w).max(1) / numpy.float32(127)
        return numpy.rint(w / scales[:, None]).astype(numpy.int8), scales

    def values(self, q):
        return q[0] * q[1][:, None]

    def nbytes(self, q):
        return sum(part.nbytes for part in q)

    def layer(self, q):
        inputs = ["x", "codes", "scales"]
        node = helper.make_node("DynamicQuantizeMatMul", inputs, ["y"], domain="com.microsoft")
        return session(node, {"codes": numpy.ascontiguousarray(q[0].T), "scales": q[1]})


class Floats(Unquantized, Format):
    def layer(self, w):
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        return session(node, {"w": numpy.ascontiguousarray(w.T)})


serve(
    {
        "4-bit b32, int8": Blocks4(32, 4),
        "4-bit b128, int8": Blocks4(128, 4),
        "4-bit b128, f32": Blocks4(128, 1),
        "nf4": Nf4(),
        "int8": Int8(),
        "f32": Floats(),
    },
    # Its quantizers take [k, n].
    lambda array, dtype: numpy.asfortranarray(array),
)
