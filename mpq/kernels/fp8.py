"""Quantization to FP8 and INT8 in one pass, in Triton: rows for what is summed along them, columns for V of attention.

    rows      x (..., K)      -> codes (..., K padded), scale (...)              amax, divide, round: x is read once
    columns   x (B, H, S, D)  -> codes (B, H, D, S padded), scale (B, H, D)      transposed on the way

FP8 matrix instructions of Hopper take both operands with the summed dimension contiguous, so V, whose rows are summed
over in P V, is written transposed; it is rewritten anyway. Padding is zero and adds nothing to a product.

On a GPU a cast to FP8 rounds to nearest, ties to even, and saturates. Triton's interpreter (3.6.0), which runs these
kernels on CPUs in the tests, does not: in FP8 it rounds ties away from zero, loses the carry out of the mantissa
(7.93 becomes 4), cuts subnormals off instead of rounding them and never saturates; BF16 it cuts off; and it multiplies
BF16 matrices as if their bits were integers. Values that lie on the format's grid it casts exactly, though, so `cast` and
`dot` put them there first when interpreted. INTERPRETED is a constant of compilation: on a GPU none of that code exists.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpq.formats.format import Format

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
    torch.int8: tl.int8,
}
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """FP32 `x` in `dtype`, to nearest, ties to even; |x| is at most the format's maximum."""
    if dtype == tl.int8:  # a cast to integers cuts: FP32's own addition rounds first
        x = (x + 12582912.0) - 12582912.0
    elif INTERPRETED and dtype != tl.float32:
        # adding and subtracting 1.5 · 2^(23 - m) binades leaves m mantissa bits; no binade is smaller than that of subnormals
        binade = (x.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        binade = tl.maximum(binade, 2.0 ** (1 - dtype.exponent_bias))
        shift = binade * (1.5 * 2.0 ** (23 - dtype.fp_mantissa_width))
        x = (x + shift) - shift
    return x.to(dtype)


@triton.jit
def dot(a, b):
    """The matrix product of two tiles, in FP32; FP32 operands are not cut to TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def scale_of(amax, maximum, perturb):
    """The scale that maps `amax` onto `maximum`; 1 where everything is zero (quantize.scale_of)."""
    scale = amax / maximum
    return tl.where(scale > _TINY, scale, 1.0) * perturb


@triton.jit
def _rows_kernel(
    x,
    codes,
    scales,
    given,
    count,
    heads,
    length,
    width,
    padded,
    stride_b,
    stride_h,
    stride_s,
    maximum,
    perturb,
    DTYPE: tl.constexpr,
    GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = row < count
    start = (
        x
        + row // (heads * length) * stride_b
        + row // length % heads * stride_h
        + row % length * stride_s
    )
    inside = there[:, None] & (column < width)[None, :]
    values = tl.load(start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        scale = tl.zeros([ROWS], tl.float32) + tl.load(given)
    else:
        scale = scale_of(tl.max(tl.abs(values), 1), maximum, perturb)
    values = values * (1.0 / scale)[:, None]
    if GIVEN:  # what lies above a scale chosen beforehand is clipped
        values = tl.minimum(tl.maximum(values, -maximum), maximum)
    place = codes + row[:, None] * padded + column[None, :]
    tl.store(place, cast(values, DTYPE), mask=there[:, None] & (column < padded)[None, :])
    tl.store(scales + row, scale, mask=there)


@triton.jit
def _columns_kernel(
    x,
    codes,
    scales,
    heads,
    length,
    width,
    padded,
    stride_b,
    stride_h,
    stride_s,
    maximum,
    perturb,
    DTYPE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    matrix = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x += matrix // heads * stride_b + matrix % heads * stride_h
    amax = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_S):
        row = start + tl.arange(0, BLOCK_S)
        inside = (row < length)[:, None] & (column < width)[None, :]
        values = tl.load(x + row[:, None] * stride_s + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        amax = tl.maximum(amax, tl.max(tl.abs(values), 0))
    scale = scale_of(amax, maximum, perturb)
    place = codes + (matrix * width + column)[:, None] * padded
    for start in range(0, padded, BLOCK_S):
        row = start + tl.arange(0, BLOCK_S)
        inside = (row < length)[:, None] & (column < width)[None, :]
        values = tl.load(x + row[:, None] * stride_s + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        rounded = cast(tl.trans(values * (1.0 / scale)[None, :]), DTYPE)
        tl.store(
            place + row[None, :], rounded, mask=(column < width)[:, None] & (row < padded)[None, :]
        )
    tl.store(scales + matrix * width + column, scale, mask=column < width)


def quantize_rows(
    x: Tensor, fmt: Format, padding: int = 16, perturb: float = 1.0, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (..., K up to a multiple of `padding`) and FP32 scales (...) of `x` (..., K), whatever its strides.

    `scale`, one FP32 number on x's device, is taken for every row if given, and what it does not cover is clipped; `perturb`
    then counts for nothing.
    """
    shape, k = x.shape[:-1], x.shape[-1]
    x = x if x.ndim == 4 and x.stride(-1) == 1 else x.reshape(1, 1, -1, k).contiguous()
    _, heads, length, _ = x.shape
    count, padded = x.numel() // max(1, k), padding * math.ceil(k / padding)
    codes = torch.empty(*shape, padded, dtype=getattr(torch, fmt.dtype), device=x.device)
    scales = torch.empty(shape, dtype=torch.float32, device=x.device)
    if count:
        block = max(16, triton.next_power_of_2(padded))
        rows = max(1, 2048 // block)
        _rows_kernel[(triton.cdiv(count, rows),)](
            x,
            codes,
            scales,
            scales if scale is None else scale,
            count,
            heads,
            length,
            k,
            padded,
            *x.stride()[:3],
            fmt.maximum,
            perturb,
            DTYPE=DTYPES[codes.dtype],
            GIVEN=scale is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=min(16, max(4, block // 512)),
        )
    return codes, scales


def quantize_columns(
    x: Tensor, fmt: Format, padding: int = 16, perturb: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Codes (B, H, D, S up to a multiple of `padding`), transposed, and FP32 scales (B, H, D) of `x` (B, H, S, D), whose
    columns have a scale each."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    b, h, s, d = x.shape
    padded, block = padding * math.ceil(s / padding), 32
    codes = torch.empty(b, h, d, padded, dtype=getattr(torch, fmt.dtype), device=x.device)
    scales = torch.empty(b, h, d, dtype=torch.float32, device=x.device)
    _columns_kernel[(b * h, triton.cdiv(d, block))](
        x,
        codes,
        scales,
        h,
        s,
        d,
        padded,
        *x.stride()[:3],
        fmt.maximum,
        perturb,
        DTYPE=DTYPES[codes.dtype],
        BLOCK_S=128,
        BLOCK_D=block,
        num_warps=4,
    )
    return codes, scales
