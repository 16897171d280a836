"""What `ops.py` compares: each row an operation of ours, its peers, and the limit of
the machine that bounds it."""

import typing

PEERS = ("bitsandbytes", "onnxruntime", "openvino", "torch", "ggml", "candle")
MEMORY = ("read", "write", "write_past_caches")

# 256 MiB of f32.
MANY = {"rows": 16384, "dtype": "f32"}
# For searches, which take seconds.
SOME = {"rows": 2048, "dtype": "f32"}


class Row(typing.NamedTuple):
    name: str
    op: str
    shape: dict
    ours: dict
    peers: list
    limit: str


BLOCKS_OF_128 = [
    ("onnxruntime", "4-bit b128, int8"),
    ("openvino", "u4 g128, int8"),
    ("openvino", "u4 g128, bf16"),
    ("torch", "int4 g128"),
]
BLOCKS_OF_32 = [
    ("onnxruntime", "4-bit b32, int8"),
    ("openvino", "u4 g32, int8"),
    ("candle", "q4_k"),
    ("candle", "q4_0"),
]
NF4 = [("bitsandbytes", "nf4")]
FOUR_BITS = BLOCKS_OF_128 + BLOCKS_OF_32 + NF4
ROWS_OF_8_BITS = [("torch", "int8"), ("onnxruntime", "int8"), ("bitsandbytes", "llm.int8")]
EIGHT_BITS = [*ROWS_OF_8_BITS, ("candle", "q8_0")]
FLOATS = [("torch", "f32"), ("onnxruntime", "f32"), ("onnxruntime", "4-bit b128, f32")]


def format(name, **options):
    return {"format": name, "options": options}


def quantize(title, ours, peers, shape=MANY):
    return Row(f"quantize {title}", "quantize", shape, ours, peers, "read")


def dequantize(name, peers):
    return Row(f"dequantize {name}", "dequantize", MANY, format(name), peers, "write_past_caches")


LIMIT_OF = {"f32": "fma_f32", "bf16": "dot_bf16", "int8": "dot_int8"}


def product(m, title, ours, peers, compute="int8"):
    """In int8 with weights that are packed before, as peers have them too."""
    shape = {"m": m, "rows": 4096, "dtype": "f32"}
    ours = {**ours, "compute": compute, "packed": compute == "int8"}
    limit = "read" if m == 1 else LIMIT_OF[compute]
    return Row(f"m = {m}: {title}, {compute}", "matmul", shape, ours, peers, limit)


def ggml(name):
    return ("ggml", name)


def both(name):
    """Of the two that have ggml's formats."""
    return [ggml(name), ("candle", name)]


INT8_ROWS = [("bitsandbytes", "llm.int8"), ("torch", "int8"), ("bitsandbytes", "dynamic8")]
NF4_BLOCKS = [*NF4, ("onnxruntime", "nf4")]
INT4_BLOCKS = [("onnxruntime", "4-bit b128, int8"), *both("q4_0")]
BF16 = {**MANY, "dtype": "bf16"}

ROWS = [
    quantize("int8", format("int8"), INT8_ROWS),
    quantize("q8_0", format("q8_0"), both("q8_0")),
    quantize("nf4", format("nf4"), NF4_BLOCKS),
    quantize("int4", format("int4"), INT4_BLOCKS),
    quantize("int8 from bf16", format("int8"), INT8_ROWS, BF16),
    quantize("nf4 from bf16", format("nf4"), NF4, BF16),
    quantize("q4_k, searched", format("q4_k"), both("q4_k"), SOME),
    quantize("q6_k, searched", format("q6_k"), both("q6_k"), SOME),
    quantize("iq4_nl, searched", format("iq4_nl"), [ggml("iq4_nl")], SOME),
    quantize("nf4 mse (peers: not searched)", format("nf4", method="mse"), NF4_BLOCKS, SOME),
    dequantize("int8", INT8_ROWS),
    dequantize("q8_0", both("q8_0")),
    dequantize("int4", both("q4_0")),
    dequantize("nf4", NF4),
    dequantize("q4_0", both("q4_0")),
    dequantize("q4_k", both("q4_k")),
    dequantize("q6_k", both("q6_k")),
    dequantize("iq4_nl", [ggml("iq4_nl")]),
    dequantize("mxfp4", [ggml("mxfp4")]),
    product(1, "int4 g128", format("int4"), FOUR_BITS),
    product(1, "q4_0", format("q4_0"), FOUR_BITS),
    product(1, "nf4", format("nf4"), FOUR_BITS),
    product(1, "q4_k", format("q4_k"), FOUR_BITS),
    product(1, "mxfp4", format("mxfp4"), FOUR_BITS),
    product(1, "int8", format("int8"), EIGHT_BITS),
    product(1, "q8_0", format("q8_0"), EIGHT_BITS),
    product(8, "int4 g128", format("int4"), FOUR_BITS),
    product(8, "q4_0", format("q4_0"), FOUR_BITS),
    product(8, "nf4", format("nf4"), FOUR_BITS),
    product(8, "int8", format("int8"), EIGHT_BITS),
    product(8, "q8_0", format("q8_0"), EIGHT_BITS),
    product(32, "int4 g128", format("int4"), FOUR_BITS),
    product(32, "int8", format("int8"), EIGHT_BITS),
    product(128, "int4 g128", format("int4"), FOUR_BITS),
    product(128, "int8", format("int8"), EIGHT_BITS),
    product(512, "int8 per row", format("int8"), ROWS_OF_8_BITS),
    product(512, "int4 g128", format("int4"), BLOCKS_OF_128),
    product(512, "q4_0", format("q4_0"), BLOCKS_OF_32),
    product(512, "nf4", format("nf4"), NF4),
    product(512, "nf4", format("nf4"), NF4, "bf16"),
    product(512, "int4 g128, exact", format("int4"), FLOATS, "f32"),
]
