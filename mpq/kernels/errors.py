"""What rounding a tensor does to a loss whose gradient is known, for every format in one sweep.

On a CPU the sweep is C++ (errors.cpp). Elsewhere, and where no C++ can be compiled, torch does it with
rounding.rounded, whose results are the definition of the error: Q_f(u) − u at the scales of an emulated kernel.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mpq.formats.format import Format
from mpq.formats.quantize import Granularity, amax_of, binade
from mpq.kernels.compiler import compiled
from mpq.kernels.rounding import rounded

log = logging.getLogger(__name__)

MAGNITUDES = 3  # the sums before the formats': of u², of its squared binade, of its largest
Sums = Callable[[Tensor], Tensor]

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_SCALED, _INTEGER, _UNSCALED, _BF16 = range(4)  # Kind of errors.cpp


class _Format(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("mantissa_bits", ctypes.c_int32),
        ("min_exponent", ctypes.c_int32),
        ("maximum", ctypes.c_float),
    ]


def weighted_sums(
    u: Tensor, formats: Sequence[Format], granularity: Granularity, *, often: bool = False
) -> Sums:
    """A function of a gradient g of u's shape (…, T, K): Σ g² times each squared magnitude of u.

    It returns (3 + formats,) float64: the magnitudes are u, 2^floor(log2|u|), the largest |u| of
    the element's neighbourhood, and Q_f(u) − u for each format. `often` says that several
    gradients come: then torch keeps the magnitudes between them.
    """
    column = granularity == "column"
    # a column's neighbourhood is a row of the transpose
    u = u.detach().transpose(-1, -2) if column else u.detach()
    if u.device.type == "cpu" and u.dtype in _SUFFIX and u.numel() and _library():
        dense, as_rows = u.contiguous(), _described(formats, u.dtype)
        return lambda g: _swept(g.transpose(-1, -2) if column else g, dense, *as_rows)
    kept = list(_magnitudes(u, formats)) if often else None

    def sums(g: Tensor) -> Tensor:
        squared = (g.transpose(-1, -2) if column else g).float().square()
        found = kept if kept is not None else _magnitudes(u, formats)
        return torch.stack([(squared * magnitude).sum() for magnitude in found]).double()

    return sums


def _magnitudes(u: Tensor, formats: Sequence[Format]) -> Iterator[Tensor]:
    yield u.float().square()
    yield binade(u).square_()
    yield amax_of(u, "row").square()
    for fmt in formats:
        yield (rounded(u, fmt, "row").float() - u.float()).square_()


def _described(formats: Sequence[Format], dtype: torch.dtype) -> tuple[object, list[int], int]:
    """The formats that round a tensor of `dtype` at all, as errors.cpp reads them, and their places."""
    own = str(dtype).removeprefix("torch.")
    places = [i for i, f in enumerate(formats) if f.bits <= 16 and f.dtype != own]
    rows = (_Format * len(places))()
    for row, place in zip(rows, places, strict=True):
        f = formats[place]
        if f.kind == "int":
            row.kind, row.mantissa_bits, row.min_exponent = _INTEGER, 23, 23
        else:
            row.kind = _SCALED if f.needs_scale else _BF16 if f.name == "bf16" else _UNSCALED
            row.mantissa_bits, row.min_exponent = f.mantissa_bits, f.min_normal_exponent
        row.maximum = f.maximum
    return rows, places, len(formats)


def _swept(g: Tensor, u: Tensor, rows: object, places: list[int], count: int) -> Tensor:
    g, k = g.to(u.dtype).contiguous(), u.shape[-1]
    library = _library()
    assert library is not None  # the caller has seen to it
    # a row's sums each to itself, and not one for all: threads add in no order of their own
    by_row = torch.empty(u.numel() // k, MAGNITUDES + len(places))
    sweep = getattr(library, f"sums_{_SUFFIX[u.dtype]}")
    sweep(
        g.data_ptr(),
        u.data_ptr(),
        len(by_row),
        k,
        ctypes.byref(rows),  # type: ignore[arg-type]
        len(places),
        by_row.data_ptr(),
    )
    sums = torch.zeros(MAGNITUDES + count, dtype=torch.float64)
    sums[[*range(MAGNITUDES), *(MAGNITUDES + i for i in places)]] = by_row.sum(
        0, dtype=torch.float64
    )
    return sums


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = compiled(Path(__file__).with_name("errors.cpp"))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "Sensitivity is summed by torch, and slowly, since C++ cannot be compiled here: %s",
            error,
        )
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for suffix in _SUFFIX.values():
        entry = getattr(library, f"sums_{suffix}")
        entry.argtypes = [pointer, pointer, size, size, pointer, ctypes.c_int32, pointer]
    return library
