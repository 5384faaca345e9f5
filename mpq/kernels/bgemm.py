"""Products of codes with scales, in Triton: attention's in FP8 that no fused kernel can express, linears in INT8 and FP8 blocks.

    a (B, H, T, K) x b (B, H_kv, K, N) -> (B, H, T, N)
    a (T, K) x b (C, K) -> (T, C)

Codes of both have the summed dimension contiguous, with a scale for each row of `a` and each column of `b`. With grouped-query attention the H / H_kv heads
that share a head of `b` are rows of one taller matrix, (H / H_kv) T x K: nothing is repeated, in memory or in traffic.

INT8 is summed in 32 bits, exactly. FP8 blocks are 128 steps of the sum: a tile's product is multiplied by its two
blocks' scales before it is added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpq.formats.format import Format
from mpq.kernels.fp8 import DTYPES, cast, dot, quantize_columns, quantize_rows

PADDING = 64  # of the summed dimension, so that the loop over it needs no masks
WIDE = 128  # columns, and rows, of a block that shares a scale
GROUP = 8  # rows of tiles that walk along together and meet the same columns in the L2 cache


@triton.jit
def summed(
    a,
    b,
    a_scale,
    b_scale,
    from_a,
    from_b,
    m,
    k,
    SUM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile in FP32, scales multiplied in: the products of rows `from_a` of `a` and `from_b` of `b`, each k long. Scales of blocks
    are (k / BLOCK_K, m) of `a`, and of `b` those of BLOCK_K rows that follow each other."""
    step = tl.arange(0, BLOCK_K)
    a += from_a[:, None] * k + step[None, :]
    b += from_b[None, :] * k + step[:, None]
    total = tl.zeros([from_a.shape[0], from_b.shape[0]], SUM)
    for start in range(0, k, BLOCK_K):
        # added apart: within one call Hopper's FP8 sums keep some 14 bits, too few for a sum over a long sequence
        part = dot(tl.load(a + start), tl.load(b + start)).to(SUM)
        if BLOCKS:  # a step is a block wide
            of_a = tl.load(a_scale + start // BLOCK_K * m + from_a)
            of_b = tl.load(b_scale + from_b // BLOCK_K * (k // BLOCK_K) + start // BLOCK_K)
            part *= of_a[:, None] * of_b[None, :]
        total += part
    total = total.to(tl.float32)
    if not BLOCKS:
        total *= tl.load(a_scale + from_a)[:, None] * tl.load(b_scale + from_b)[None, :]
    return total


@triton.jit
def _product_kernel(
    a,
    b,
    out,
    a_scale,
    b_scale,
    m,
    n,
    k,
    OUT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    across, down = tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M)
    matrix, tile = (
        (tl.program_id(0) // (across * down)).to(tl.int64),
        tl.program_id(0) % (across * down),
    )
    group, within = tile // (GROUP * across), tile % (GROUP * across)
    height = min(down - group * GROUP, GROUP)
    row = (group * GROUP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows past the end are read as others and never written
    from_a, from_b = matrix * m + row % m, matrix * n + column % n
    total = summed(a, b, a_scale, b_scale, from_a, from_b, m, k, SUM, BLOCKS, BLOCK_K)
    place = out + (matrix * m + row)[:, None] * n + column[None, :]
    tl.store(place, cast(total, OUT), mask=(row < m)[:, None] & (column < n)[None, :])


def _launch(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor, m: int, n: int, blocks: bool
) -> None:
    """The product of len(b) = out.numel() / (m n) pairs of matrices, codes and scales each, into `out`."""
    k = a[0].shape[-1]
    step = WIDE if blocks or not k % (2 * PADDING) else PADDING
    # two sums of 128 x 128, a step's and all, would not fit into registers
    block_m, block_n = (128, 128) if n > 64 and not blocks else (128, 64)
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n) * (out.numel() // (m * n)),)
    _product_kernel[grid](
        a[0],
        b[0],
        out,
        a[1],
        b[1],
        m,
        n,
        k,
        OUT=DTYPES[out.dtype],
        SUM=tl.int32 if a[0].dtype == torch.int8 else tl.float32,
        BLOCKS=blocks,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=step,
        GROUP=GROUP,
        num_warps=8,
        num_stages=4,
    )


def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """(B, H, T, N) in `dtype`. Each operand is its codes and the scales of its rows, as fp8.py gives them, with K padded to a
    multiple of PADDING: a (B, H, T, K) and (B, H, T), b (B, H_kv, N, K) and (B, H_kv, N)."""
    (batch, heads, length, _), (_, kv_heads, n, _) = a[0].shape, b[0].shape
    out = torch.empty(batch, heads, length, n, dtype=dtype, device=a[0].device)
    _launch(a, b, out, heads // kv_heads * length, n, blocks=False)
    return out


def linear(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, blocks: bool
) -> Tensor:
    """(T, C) in `dtype` of codes a (T, K) and b (C, K), K a multiple of PADDING, and their FP32 scales: those of rows, (T) and
    (C), or with `blocks`, for which K is one of WIDE, (K / WIDE, T) of 1 x WIDE blocks and (C up / WIDE, K / WIDE) of WIDE x WIDE."""
    out = torch.empty(len(a[0]), len(b[0]), dtype=dtype, device=a[0].device)
    if out.numel():
        _launch(a, b, out, len(a[0]), len(b[0]), blocks)
    return out


def matmul(
    a: Tensor, b: Tensor, fmt: Format, perturb_a: float = 1.0, perturb_b: float = 1.0
) -> Tensor:
    """a (B, H, T, K) x b (B, H_kv, K, N) -> (B, H, T, N) in a's dtype, computed in an FP8 format with a scale for each row of
    `a` and each column of `b`, which `perturb_*` multiply."""
    rows = quantize_rows(a, fmt, PADDING, perturb_a)
    # Kᵀ is K's memory, whose rows are there already; V's columns have to be written out
    lies_ready = b.stride(-2) == 1
    columns = (
        quantize_rows(b.mT, fmt, PADDING, perturb_b)
        if lies_ready
        else quantize_columns(b, fmt, PADDING, perturb_b)
    )
    return product(rows, columns, a.dtype)
