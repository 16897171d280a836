"""ggml's own C code for its formats, as the package libgguf has it; no products."""

import libgguf
import numpy

from peer import serve

TYPES = {t.name.lower(): t.value for t in libgguf.GGMLQuantizationType}


class Blocks:
    def __init__(self, name):
        self.type = TYPES[name]

    def quantize(self, w):
        n, k = w.shape
        out = numpy.empty((n, libgguf.row_size(self.type, k)), numpy.uint8)
        libgguf.quantize_rows_into_raw(self.type, w, out, n, k)
        return out, numpy.empty(w.shape, numpy.float32)

    def dequantize(self, q):
        blocks, out = q
        libgguf.dequantize_rows_into_raw(self.type, blocks, out, *out.shape)
        return out

    values = dequantize


NAMES = ("q8_0", "q4_0", "q4_k", "q6_k", "iq4_nl", "mxfp4")
serve({name: Blocks(name) for name in NAMES}, lambda array, dtype: array)
