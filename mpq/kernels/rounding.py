"""quantize.fake_quantize on a CPU in one sweep of C++ (rounding.cpp), bit for bit: an emulated plan rounds at every call.

fake_quantize is the definition, and does itself what the C++ does not cover: other devices and dtypes, one scale for a
whole tensor, gradients, and all of it where no C++ can be compiled, which the log says.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from mpq.formats.format import Format
from mpq.formats.quantize import Granularity, fake_quantize
from mpq.kernels.compiler import compiled

log = logging.getLogger(__name__)

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_POINTERS, _SIZE, _FLOAT = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int64, ctypes.c_float
_GRID = [
    ctypes.c_int32,
    ctypes.c_int32,
    _FLOAT,
]  # mantissa bits, exponent of the smallest normal, maximum
_ARGUMENTS = {
    "row": [*_POINTERS, _SIZE, _SIZE, *_GRID, _FLOAT],
    "column": [*_POINTERS, _SIZE, _SIZE, _SIZE, *_GRID, _FLOAT],
    "unscaled": [*_POINTERS, _SIZE, *_GRID],
}


def rounded(x: Tensor, fmt: Format, granularity: Granularity, perturb: float = 1.0) -> Tensor:
    """`x` as fake_quantize rounds it; `x` itself where it is in the format already."""
    if x.dtype == getattr(torch, fmt.dtype):
        return x
    library = _library() if _covers(x, fmt, granularity) else None
    if library is None:
        return fake_quantize(x, fmt, granularity, perturb)
    column = fmt.needs_scale and granularity == "column"
    if column or not _rows_lie_densely(x):
        x = x.contiguous()
    out, suffix = torch.empty_like(x), f"{fmt.kind}_{_SUFFIX[x.dtype]}"
    # an integer grid is one whose smallest normal has steps of 1, and nothing is larger than its maximum
    bits, exponent = (23, 23) if fmt.kind == "int" else (fmt.mantissa_bits, fmt.min_normal_exponent)
    pointers, grid = (x.data_ptr(), out.data_ptr()), (bits, exponent, fmt.maximum)
    if fmt.name == "bf16":
        library.bf16_f32(*pointers, x.numel())
    elif not fmt.needs_scale:
        getattr(library, f"unscaled_{suffix}")(*pointers, x.numel(), *grid)
    elif column:
        rows, k = x.shape[-2:]
        getattr(library, f"column_{suffix}")(
            *pointers, x.numel() // (rows * k), rows, k, *grid, perturb
        )
    else:
        k = x.shape[-1]
        getattr(library, f"row_{suffix}")(*pointers, x.numel() // k, k, *grid, perturb)
    return out


def _covers(x: Tensor, fmt: Format, granularity: Granularity) -> bool:
    if x.device.type != "cpu" or x.dtype not in _SUFFIX or x.ndim < 2 or x.numel() == 0:
        return False
    if fmt.bits > 16 or (fmt.needs_scale and granularity == "tensor"):
        return False
    return not (x.requires_grad and torch.is_grad_enabled())


def _rows_lie_densely(x: Tensor) -> bool:
    """Whether memory is filled by the rows of `x`, in whatever order: heads moved before tokens, say."""
    strides = x.stride()
    order = sorted(range(x.ndim - 1), key=lambda d: -strides[d])
    return x.is_contiguous() or x.permute(*order, x.ndim - 1).is_contiguous()


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = compiled(Path(__file__).with_name("rounding.cpp"))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "Emulated formats are rounded by torch, and slowly, since C++ cannot be compiled here: %s",
            error,
        )
        return None
    for entry, kind, suffix in itertools.product(_ARGUMENTS, ("float", "int"), _SUFFIX.values()):
        if entry != "unscaled" or kind == "float":
            getattr(library, f"{entry}_{kind}_{suffix}").argtypes = _ARGUMENTS[entry]
    library.bf16_f32.argtypes = [*_POINTERS, _SIZE]
    return library
