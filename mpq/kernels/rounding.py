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
from typing import Any

import torch
from torch import Tensor

from mpq.formats.format import Format
from mpq.formats.quantize import Granularity, blocks_of, fake_quantize, from_blocks, share_of
from mpq.kernels.compiler import compiled
from mpq.kernels.grid import GridFormat, described

log = logging.getLogger(__name__)

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_POINTERS, _SIZE, _FLOAT = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int64, ctypes.c_float
_FORMAT = ctypes.POINTER(GridFormat)
_ARGUMENTS = {
    "row": [*_POINTERS, _SIZE, _SIZE, _FORMAT, _FLOAT, _FLOAT],
    "column": [*_POINTERS, _SIZE, _SIZE, _SIZE, _FORMAT, _FLOAT],
    "unscaled": [*_POINTERS, _SIZE, _FORMAT],
}


def rounded(x: Tensor, fmt: Format, granularity: Granularity, perturb: float = 1.0) -> Tensor:
    """`x` as fake_quantize rounds it; `x` itself where it is in the format already."""
    if not fmt.needs_scale and x.dtype == getattr(torch, fmt.dtype):
        return x
    library = _library() if _covers(x, fmt, granularity) else None
    if library is None:
        return fake_quantize(x, fmt, granularity, perturb)
    if fmt.by_blocks:
        blocks = _by_row(library, _as_blocks(x, fmt), fmt, share_of(x, fmt), perturb)
        return from_blocks(blocks, fmt, x.shape)
    column = fmt.needs_scale and granularity == "column"
    if column or not _rows_lie_densely(x):
        x = x.contiguous()
    if fmt.needs_scale and not column:
        return _by_row(library, x, fmt, 1.0, perturb)
    out, pointer = torch.empty_like(x), ctypes.byref(described(fmt))
    suffix = f"{fmt.kind}_{_SUFFIX[x.dtype]}"
    if fmt.name == "bf16":
        library.bf16_f32(x.data_ptr(), out.data_ptr(), x.numel())
    elif not fmt.needs_scale:
        getattr(library, f"unscaled_{suffix}")(x.data_ptr(), out.data_ptr(), x.numel(), pointer)
    else:
        rows, k = x.shape[-2:]
        getattr(library, f"column_{suffix}")(
            x.data_ptr(), out.data_ptr(), x.numel() // (rows * k), rows, k, pointer, perturb
        )
    return out


def _as_blocks(x: Tensor, fmt: Format) -> Tensor:
    """Each block a row, densely: `x` itself where its rows are whole blocks."""
    rows, columns = fmt.block
    if rows == 1 and x.shape[-1] % columns == 0:
        return x.contiguous().view(*x.shape[:-1], -1, columns)
    return blocks_of(x, fmt).contiguous()


def _by_row(library: Any, x: Tensor, fmt: Format, share: float, perturb: float) -> Tensor:
    """Rows of a dense `x`, each with a scale."""
    out, k = torch.empty_like(x), x.shape[-1]
    sweep = getattr(library, f"row_{fmt.kind}_{_SUFFIX[x.dtype]}")
    pointers = x.data_ptr(), out.data_ptr()
    sweep(*pointers, x.numel() // k, k, ctypes.byref(described(fmt)), share, perturb)
    return out


def _covers(x: Tensor, fmt: Format, granularity: Granularity) -> bool:
    if x.device.type != "cpu" or x.dtype not in _SUFFIX or x.ndim < 2 or x.numel() == 0:
        return False
    if fmt.bits > 16 or (fmt.needs_scale and granularity == "tensor"):
        return False
    if fmt.by_blocks and granularity != "row":
        return False  # fake_quantize says why
    if fmt.fit != "max":
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
