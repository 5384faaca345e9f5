"""An INT8 linear for CPUs with AVX2 and without VNNI (int8_linear.cpp), where oneDNN's quantized linear has no exact fast path.

    quantize (T, K) -> codes s16 (T, K up to even), scale FP32 (T, 1)      x ~ codes * scale, a scale for each row
    product  codes, scale, packed weight -> y (T, C)                       both scales and the bias applied to the sums

Codes are those of kernels/rows.py, held in 16 bits: two products fit into one instruction without saturating.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.kernels.compiler import compiled, features

log = logging.getLogger(__name__)

COLUMNS = 16  # of a panel of weights
LONGEST = (2**31 - 1) // 127**2  # terms of ±127 · ±127 that 32 bits can sum
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Packed(NamedTuple):
    """Weights as `product` reads them: codes (panels, K / 2, 16, 2) s16, the output channels' scales and bias, FP32."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None


@functools.cache
def available() -> bool:
    """Whether this CPU has AVX2 and the kernel could be compiled; the reason why not is said in the log."""
    if not features().get("avx2"):
        return False
    try:
        _library()
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("INT8 has no kernel of ours here, since C++ cannot be compiled: %s", error)
        return False
    return True


@functools.cache
def _library() -> ctypes.CDLL:
    library = compiled(Path(__file__).with_suffix(".cpp"))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for suffix in _SUFFIX.values():
        getattr(library, f"quantize_{suffix}").argtypes = [
            pointer,
            *[size] * 3,
            ctypes.c_float,
            pointer,
            pointer,
        ]
        getattr(library, f"product_{suffix}").argtypes = [*[pointer] * 5, *[size] * 3, pointer]
    return library


def pack(codes: Tensor, scale: Tensor, bias: Tensor | None) -> Packed:
    """Codes (C, K) of a weight, its output channels' scales (C) and bias (C) or None."""
    rows, k = codes.shape
    if k > LONGEST:
        raise MpqError(
            f"An INT8 product sums at most {LONGEST:,} terms in 32 bits, got {k:,}: leave this product in another format."
        )
    panels, pairs = -(-rows // COLUMNS), -(-k // 2)
    filled = torch.zeros(panels * COLUMNS, pairs * 2, dtype=torch.int16)
    filled[:rows, :k] = codes
    packed = filled.view(panels, COLUMNS, pairs, 2).transpose(1, 2).contiguous()
    return Packed(
        packed, scale.float().contiguous(), None if bias is None else bias.float().contiguous()
    )


def _quantize(x: Tensor, perturb: float) -> tuple[Tensor, Tensor]:
    rows, k = x.shape
    pairs = -(-k // 2)
    codes, scale = torch.empty(rows, pairs * 2, dtype=torch.int16), torch.empty(rows, 1)
    function = getattr(_library(), f"quantize_{_SUFFIX[x.dtype]}")
    function(x.data_ptr(), rows, k, pairs, perturb, codes.data_ptr(), scale.data_ptr())
    return codes, scale


def _product(
    codes: Tensor,
    row_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    y = torch.empty(codes.shape[0], scale.shape[0], dtype=dtype)
    pointers = [
        None if t is None else t.data_ptr() for t in (codes, row_scale, packed, scale, bias)
    ]
    getattr(_library(), f"product_{_SUFFIX[dtype]}")(
        *pointers, codes.shape[0], codes.shape[1] // 2, scale.shape[0], y.data_ptr()
    )
    return y


# torch.compile takes each for one operation; called without it, an operator of Python's would cost more than the wrapper above
_quantize_op = torch.library.custom_op("mpq::int16_codes", _quantize, mutates_args=())
_product_op = torch.library.custom_op("mpq::int16_product", _product, mutates_args=())


@_quantize_op.register_fake
def _(x: Tensor, perturb: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], -(-x.shape[1] // 2) * 2, dtype=torch.int16), x.new_empty(
        x.shape[0], 1, dtype=torch.float32
    )


@_product_op.register_fake
def _(
    codes: Tensor,
    row_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], scale.shape[0]), dtype=dtype)


def quantize(x: Tensor, perturb: float = 1.0) -> tuple[Tensor, Tensor]:
    """Codes and scales of the rows of `x` (T, K), contiguous, FP32 or BF16; `perturb` multiplies the scales."""
    return (_quantize_op if torch.compiler.is_compiling() else _quantize)(x, perturb)


def product(codes: Tensor, row_scale: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
    """The linear's output (T, C) in `dtype`, FP32 or BF16."""
    return (_product_op if torch.compiler.is_compiling() else _product)(
        codes, row_scale, *weight, dtype
    )
