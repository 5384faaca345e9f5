"""quantize.fake_quantize on a CPU in one sweep of C++ (rounding.cpp), bit for bit: an emulated plan rounds at every call.

fake_quantize is the definition, and does itself what the C++ does not cover: other devices and dtypes, one scale for a
whole tensor, gradients, and all of it where no C++ can be compiled, which the log says.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpq.formats.format import Format
from mpq.formats.quantize import Granularity, fake_quantize, share_under
from mpq.kernels.compiler import compiled
from mpq.kernels.grid import GridFormat, described

log = logging.getLogger(__name__)

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def rounded(x: Tensor, fmt: Format, granularity: Granularity, perturb: float = 1.0) -> Tensor:
    """`x` as fake_quantize rounds it; `x` itself where it is in the format already."""
    if not fmt.needs_scale and x.dtype == getattr(torch, fmt.dtype):
        return x
    library = _library() if _covers(x, fmt, granularity) else None
    if library is None:
        return fake_quantize(x, fmt, granularity, perturb)
    of = described(fmt, granularity)
    if of.rows != 1 or not _rows_lie_densely(x):
        x = x.contiguous()
    out, suffix = torch.empty_like(x), _SUFFIX[x.dtype]
    if fmt.name == "bf16":
        library.bf16_f32(x.data_ptr(), out.data_ptr(), x.numel())
    elif not fmt.needs_scale:
        getattr(library, f"unscaled_{suffix}")(x.data_ptr(), out.data_ptr(), x.numel(), of)
    else:
        # rows that share nothing are of one matrix, in whatever order they lie
        rows, k = x.numel() // x.shape[-1] if of.rows == 1 else x.shape[-2], x.shape[-1]
        run = getattr(library, f"{fmt.kind}_{suffix}")
        sizes = (x.numel() // (rows * k), rows, k)
        run(x.data_ptr(), out.data_ptr(), *sizes, of, _share_of(x, fmt, library), perturb)
    return out


def _share_of(x: Tensor, fmt: Format, library: Any) -> float:
    """quantize.share_of a dense tensor."""
    if fmt.scale != "e4m3":
        return 1.0
    largest = getattr(library, f"largest_{_SUFFIX[x.dtype]}")
    return share_under(largest(x.data_ptr(), x.numel()), fmt)


def _covers(x: Tensor, fmt: Format, granularity: Granularity) -> bool:
    if x.device.type != "cpu" or x.dtype not in _SUFFIX or x.ndim < 2 or x.numel() == 0:
        return False
    if fmt.bits > 16 or fmt.of_tensor or (fmt.needs_scale and granularity == "tensor"):
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
    numbers, format_ = [ctypes.c_void_p] * 2, ctypes.POINTER(GridFormat)
    size, scalar = ctypes.c_int64, ctypes.c_float
    for suffix in _SUFFIX.values():
        for kind in ("float", "int"):
            entry = getattr(library, f"{kind}_{suffix}")
            entry.argtypes = [*numbers, size, size, size, format_, scalar, scalar]
        getattr(library, f"unscaled_{suffix}").argtypes = [*numbers, size, format_]
        largest = getattr(library, f"largest_{suffix}")
        largest.argtypes, largest.restype = [ctypes.c_void_p, size], scalar
    library.bf16_f32.argtypes = [*numbers, size]
    return library
