#!/usr/bin/env python3
"""Writes the golden fixture of 8- and 4-bit floats: python make_small_floats.py OUTPUT.safetensors

Needs numpy, ml_dtypes and safetensors. For each dtype of ml_dtypes:

    {dtype}/values  f32 [256] (e2m1: 16), the value of each code
    {dtype}/inputs  f32, what was rounded: every finite value, what lies halfway between two
                    neighbours and the f32 to either side of that, overflow, infinities, NaN
    {dtype}/codes   u8, what each input became

ml_dtypes makes infinity or NaN of what is past the range, where saturating casts give the largest value.
"""

import sys

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {
    "f8_e4m3": ml_dtypes.float8_e4m3fn,
    "f8_e5m2": ml_dtypes.float8_e5m2,
    "f8_e8m0": ml_dtypes.float8_e8m0fnu,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


def main(path):
    fixture = {}
    for name, dtype in DTYPES.items():
        codes = np.arange(16 if name == "e2m1" else 256, dtype=np.uint8)
        values = codes.view(dtype).astype(np.float32)
        finite = np.unique(values[np.isfinite(values)])
        halfway = (finite[:-1].astype(np.float64) + finite[1:]) / 2
        halfway = halfway.astype(np.float32)
        most = finite[-1]
        extra = np.array(
            [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, -1.0], np.float32
        )
        with np.errstate(over="ignore"):
            past = most * np.array([1.01, 1.05, 1.0714, 1.0715, 1.125, 1.2, 1.25, 1.5, 2, 4], np.float32)
        inputs = np.concatenate(
            [finite, halfway, np.nextafter(halfway, np.float32(np.inf)), np.nextafter(halfway, np.float32(-np.inf)), past, -past, extra]
        ).astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            rounded = inputs.astype(dtype)
        fixture[f"{name}/values"] = values
        fixture[f"{name}/inputs"] = inputs
        fixture[f"{name}/codes"] = rounded.view(np.uint8)
    made_with = f"ml_dtypes {ml_dtypes.__version__}, numpy {np.__version__}"
    save_file(fixture, path, metadata={"made_with": made_with})
    print(f"{path}: {len(fixture)} tensors, {made_with}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
