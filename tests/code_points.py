"""Every value of the narrow formats, as NumPy and ml_dtypes decode them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from mpq.formats.format import FORMATS

REFERENCE = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
}


def code_points(name: str) -> np.ndarray:
    """Every finite value of a format, ascending, decoded by the reference."""
    codes = (
        np.arange(256, dtype=np.uint8)
        if FORMATS[name].bits == 8
        else np.arange(65536, dtype=np.uint16)
    )
    values = codes.view(REFERENCE[name]).astype(np.float64)
    return np.unique(values[np.isfinite(values)])
