#!/usr/bin/env python3
"""Writes the golden fixture of GGUF files: python make_gguf.py OUTPUT.gguf

Needs gguf and numpy. Metadata of every value type, nested arrays and an alignment of
its own; tensors of every type that gguf quantizes to, each as `w.{type}` beside what
gguf dequantizes it to, `w.{type}.values` in f32.
"""

import importlib.metadata
import sys

import numpy
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from gguf import GGUFWriter, quants

QUANTIZED = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.MXFP4]
SCALARS = {
    "u8": (Value.UINT8, 250), "i8": (Value.INT8, -100),
    "u16": (Value.UINT16, 65000), "i16": (Value.INT16, -30000),
    "u32": (Value.UINT32, 4_000_000_000), "i32": (Value.INT32, -2_000_000_000),
    "u64": (Value.UINT64, 2**63 + 1), "i64": (Value.INT64, -(2**62)),
    "f32": (Value.FLOAT32, 0.1), "f64": (Value.FLOAT64, 0.1), "bool": (Value.BOOL, True),
}


def main(path):
    writer = GGUFWriter(path, "golden")
    writer.add_custom_alignment(64)
    made_with = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("gguf", "numpy"))
    writer.add_string("made_with", made_with)
    for name, (kind, value) in SCALARS.items():
        writer.add_key_value(f"value.{name}", value, kind)
    writer.add_string("value.string", "naïve ✓")
    writer.add_array("array.strings", ["a", "", "bc"])
    writer.add_array("array.ints", [1, -2, 3])
    writer.add_array("array.nested", [[1, 2], [3]])
    generator = numpy.random.default_rng(1)
    x = generator.standard_normal((3, 64), dtype=numpy.float32)
    x[1, :32] = 0
    writer.add_tensor("w.f32", x)
    writer.add_tensor("w.f16", x.astype(numpy.float16))
    # Not a multiple of the alignment: what follows is padded to.
    writer.add_tensor("odd", numpy.arange(5, dtype=numpy.int8))
    for kind in QUANTIZED:
        data = quants.quantize(x, kind)
        name = f"w.{kind.name.lower()}"
        writer.add_tensor(name, data, raw_dtype=kind)
        writer.add_tensor(f"{name}.values", quants.dequantize(data, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{path}: {made_with}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
