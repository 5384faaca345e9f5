"""A format as the C++ kernels read it (grid.h)."""

from __future__ import annotations

import ctypes

from mpq.formats.format import Format
from mpq.formats.quantize import Granularity

_SCALED, _INTEGER, _UNSCALED, _BF16 = range(4)
_SCALES = ("fp32", "bf16", "e8m0", "e4m3")


class GridFormat(ctypes.Structure):
    """What decides the numbers of a format and its scales; `rows` and `columns` are of the block that shares one, 0 for all."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("mantissa_bits", ctypes.c_int32),
        ("min_exponent", ctypes.c_int32),
        ("scale", ctypes.c_int32),
        ("maximum", ctypes.c_float),
        ("minimum", ctypes.c_float),
        ("top", ctypes.c_float),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    ]


def described(fmt: Format, granularity: Granularity = "row") -> GridFormat:
    """The format for C++, its scales those of its rows and blocks, or of columns."""
    if (
        fmt.kind == "int"
    ):  # a grid whose smallest normal has steps of 1, and nothing is larger than its maximum
        kind, bits, exponent = _INTEGER, 23, 23
    else:
        kind = _SCALED if fmt.needs_scale else _BF16 if fmt.name == "bf16" else _UNSCALED
        bits, exponent = fmt.mantissa_bits, fmt.min_normal_exponent
    rows, columns = (0, 1) if granularity == "column" else fmt.block
    ends = (fmt.maximum, fmt.lowest, fmt.top)
    return GridFormat(kind, bits, exponent, _SCALES.index(fmt.scale), *ends, rows, columns)
