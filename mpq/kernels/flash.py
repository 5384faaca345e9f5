"""Attention in one kernel with a format for each of its two products, in Triton.

    s = Q Kᵀ · scaling (+ mask)       in FP8: a scale for each row of Q and of K
    P = exp(s - max)                  not yet divided by its sum, so in (0, 1]
    O = P V / Σ P                     in FP8: P times a constant, V with a scale for each column of a head

Scores never leave the chip, as in the fused attention that the base runs, so lowering one product or both stays within fused
attention. Q is quantized as it is loaded; K and V, which many tiles of Q read, in one pass each before (fp8.py). Heads of
Q that share one of K and V read the same codes: nothing is repeated.

P needs no scale of its own: the largest P of a row is 1 once its largest score has been seen, and never more, so E4M3's
maximum is the constant that uses the whole format and cannot overflow. While a row's largest score has not been seen, P is
relative to a smaller maximum and larger than it will be; what was summed is then scaled down in FP32. P below 2^-10 / 448 of
the largest rounds to zero: a relative error of 2e-6 for each key. The constant is the row's emulated scale
(kernels/emulated.py) when all keys lie in one tile. The sum of P is that of the unrounded values, as softmax's is.

Not here: soft caps, sinks, dropout, windows given otherwise than as a mask, head dimensions above 256.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpq.formats.format import Format
from mpq.kernels.fp8 import DTYPES, cast, dot, quantize_columns, quantize_rows, scale_of

MAX_HEAD_DIM = 256
#: (rows of Q, keys, warps, stages) of a tile for a head dimension up to the key; bench/gpu_campaign.py measures others
TILES = {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)}
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(place, there, inside, BOUNDED: tl.constexpr, ODD: tl.constexpr):
    """A tile; no masks where neither the sequence nor the head dimension ends within it."""
    if BOUNDED and ODD:
        return tl.load(place, mask=there & inside, other=0.0)
    if BOUNDED:
        return tl.load(place, mask=there, other=0.0)
    if ODD:
        return tl.load(place, mask=inside, other=0.0)
    return tl.load(place)


@triton.jit
def _sweep(
    total,
    weight,
    peak,
    q,
    factor,
    k,
    v,
    k_scale,
    mask,
    row,
    start,
    end,
    keys,
    stride_ks,
    stride_vs,
    stride_vd,
    stride_ms,
    lift,
    BOUNDED: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    QK: tl.constexpr,
    AV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys from `start`, a multiple of BLOCK_N, to `end`; BOUNDED where some of them are not attended to by every row."""
    dims, values = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for first in tl.range(start, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        there = key < keys
        k_place = k + key[None, :] * stride_ks + dims[:, None]
        k_tile = _load(
            k_place, there[None, :], (dims < HEAD_DIM)[:, None], BOUNDED, BLOCK_D != HEAD_DIM
        )
        if QK.primitive_bitwidth == 8:
            s = dot(q, k_tile) * _load(k_scale + key, there, there, BOUNDED, False)[None, :]
        else:
            s = dot(q, cast(k_tile.to(tl.float32), QK))
        slope = factor
        if BOUNDED:
            attended = there[None, :]
            if CAUSAL:
                attended = attended & (key[None, :] <= row[:, None])
            if MASK != "none":
                given = tl.load(mask + key[None, :] * stride_ms, mask=attended, other=0)
                if MASK == "additive":
                    s = s * factor[:, None] + given.to(tl.float32) * _LOG2E
                    slope = factor * 0.0 + 1.0
                else:
                    attended = attended & (given != 0)
            s = tl.where(attended, s, float("-inf"))
        highest = tl.maximum(peak, tl.max(s, 1) * slope)
        against = tl.where(
            highest == float("-inf"), 0.0, highest
        )  # a row that has attended to nothing yet
        p = tl.exp2(s * slope[:, None] - (against - lift)[:, None])
        fade = tl.exp2(peak - against)
        weight = weight * fade + tl.sum(p, 1)
        v_place = v + key[:, None] * stride_vs + values[None, :] * stride_vd
        v_tile = _load(
            v_place, there[:, None], (values < VALUE_DIM)[None, :], BOUNDED, BLOCK_V != VALUE_DIM
        )
        if AV.primitive_bitwidth != 8:
            v_tile = cast(v_tile.to(tl.float32), AV)
        # added apart: within one call Hopper's FP8 sums keep some 14 bits, too few for a sum over a long sequence
        total = total * fade[:, None] + dot(cast(p, AV), v_tile)
        peak = highest
    return total, weight, peak


@triton.jit
def _attention_kernel(
    q,
    k,
    v,
    out,
    k_scale,
    v_scale,
    mask,
    heads,
    shared_by,
    queries,
    keys,
    scaling,
    maximum,
    perturb_q,
    lift,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_vd,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_ms,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    QK: tl.constexpr,
    AV: tl.constexpr,
    OUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, matrix = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    if CAUSAL:  # the longest first, so that none of them is left to run alone at the end
        tile = tiles - 1 - tile
    batch, head = matrix // heads, matrix % heads
    kv_head = head // shared_by
    kv_heads = heads // shared_by
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < queries
    dims, values = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    k_scale += (batch * kv_heads + kv_head) * keys
    mask += (
        batch * stride_mb
        + head * stride_mh
        + tl.where(there, row, 0).to(tl.int64)[:, None] * stride_mt
    )

    q_place = q + row.to(tl.int64)[:, None] * stride_qt + dims[None, :]
    q_tile = tl.load(q_place, mask=there[:, None] & (dims < HEAD_DIM)[None, :], other=0.0).to(
        tl.float32
    )
    factor = tl.zeros([BLOCK_M], tl.float32) + scaling * _LOG2E
    if QK.primitive_bitwidth == 8:
        q_scale = scale_of(tl.max(tl.abs(q_tile), 1), maximum, perturb_q)
        factor *= q_scale
        q_tile *= (1.0 / q_scale)[:, None]
    q_tile = cast(q_tile, QK)

    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tile + 1) * BLOCK_M)
    bounded = 0
    if MASK == "none":  # whole tiles first, without a comparison in them
        bounded = end // BLOCK_N * BLOCK_N
        if CAUSAL:
            bounded = tl.minimum(keys, tile * BLOCK_M) // BLOCK_N * BLOCK_N
        total, weight, peak = _sweep(
            total,
            weight,
            peak,
            q_tile,
            factor,
            k,
            v,
            k_scale,
            mask,
            row,
            0,
            bounded,
            keys,
            stride_ks,
            stride_vs,
            stride_vd,
            stride_ms,
            lift,
            False,
            CAUSAL,
            MASK,
            QK,
            AV,
            HEAD_DIM,
            VALUE_DIM,
            BLOCK_D,
            BLOCK_V,
            BLOCK_N,
        )
    total, weight, peak = _sweep(
        total,
        weight,
        peak,
        q_tile,
        factor,
        k,
        v,
        k_scale,
        mask,
        row,
        bounded,
        end,
        keys,
        stride_ks,
        stride_vs,
        stride_vd,
        stride_ms,
        lift,
        True,
        CAUSAL,
        MASK,
        QK,
        AV,
        HEAD_DIM,
        VALUE_DIM,
        BLOCK_D,
        BLOCK_V,
        BLOCK_N,
    )
    total *= (1.0 / tl.where(weight > 0.0, weight, 1.0))[:, None]
    inside = values < VALUE_DIM
    if AV.primitive_bitwidth == 8:
        scale = tl.load(
            v_scale + (batch * kv_heads + kv_head) * VALUE_DIM + values, mask=inside, other=0.0
        )
        total *= scale[None, :]
    o_place = out + ((batch * queries + row)[:, None] * heads + head) * VALUE_DIM + values[None, :]
    tl.store(o_place, cast(total, OUT), mask=there[:, None] & inside[None, :])


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    qk: Format | None,
    av: Format | None,
    *,
    scaling: float,
    causal: bool,
    mask: Tensor | None = None,
    perturb: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> Tensor:
    """Attention (B, T, H, D_v) in query's dtype from query (B, H, T, D), key (B, H_kv, S, D), value (B, H_kv, S, D_v).

    `qk` and `av` are FP8-E4M3, 16 bits or FP32; None is query's own dtype. Causal is aligned upper left: query t attends to
    keys up to t. `mask`, broadcast to (B, H, T, S), is added to the scores, or says where to attend if it is boolean; a row that
    attends to nothing gives zeros. `perturb` multiplies the scales of Q, K, P and V.
    """
    (batch, heads, queries, head_dim), (_, kv_heads, keys, value_dim) = query.shape, value.shape
    qk_dtype, av_dtype = (query.dtype if f is None else getattr(torch, f.dtype) for f in (qk, av))
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty(batch, queries, heads, value_dim, dtype=query.dtype, device=query.device)
    k_scale = v_scale = out  # never read unless replaced
    v_strides = value.stride()
    maximum, lift = 1.0, 0.0
    if qk is not None and qk.needs_scale:
        key, k_scale = quantize_rows(key, qk, perturb=perturb[1])
        maximum = qk.maximum
    if av is not None and av.needs_scale:
        value, v_scale = quantize_columns(value, av, perturb=perturb[3])
        b, h, d, s = value.stride()
        v_strides, lift = (b, h, s, d), math.log2(av.maximum / perturb[2])
    shape = (batch, heads, queries, keys)
    given = (
        out.new_zeros(())
        if mask is None
        else mask.view(torch.uint8)
        if mask.dtype == torch.bool
        else mask
    )
    block_d, block_v = (max(32, triton.next_power_of_2(d)) for d in (head_dim, value_dim))
    block_m, block_n, warps, stages = TILES[max(64, block_d, block_v)]
    _attention_kernel[(triton.cdiv(queries, block_m) * batch * heads,)](
        query,
        key,
        value,
        out,
        k_scale,
        v_scale,
        given,
        heads,
        heads // kv_heads,
        queries,
        keys,
        scaling,
        maximum,
        perturb[0],
        lift,
        *query.stride()[:3],
        *key.stride()[:3],
        *v_strides,
        *given.expand(shape).stride(),
        CAUSAL=causal,
        MASK="none" if mask is None else "boolean" if mask.dtype == torch.bool else "additive",
        QK=DTYPES[qk_dtype],
        AV=DTYPES[av_dtype],
        OUT=DTYPES[out.dtype],
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_D=block_d,
        BLOCK_V=block_v,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    return out
