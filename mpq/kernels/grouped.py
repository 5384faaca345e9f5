"""A layer's experts on a GPU: rows sorted by expert times each one's matrix, in one launch; how many an expert gets the device alone knows.

    x (S, K) -> codes (S, K up), their scales                   the linears' (fp8.py, block_codes.py)
    codes, codes (E, C up, K up), ends (E) -> y (S, C)          rows before ends[e], and from ends[e - 1] on, meet matrix e

    FP8, a scale a row       torch._scaled_grouped_mm (CUTLASS) on compute capability 9.0 and 10.0
    the same elsewhere, INT8, FP8 in blocks                     a product of ours, in Triton

torch's (2.13, aten/native/cuda/GroupedBlas.cpp) asks for K and C in multiples of 16, codes of rows that follow each other, matrices
whose columns do, int32 `ends`, FP32 scales (S) and (E, C), and gives BF16.

In ours a tile is rows of one expert. As many programs start as S rows of E experts can fill tiles, ⌊S / M⌋ + E rows of them; each
finds its expert among the running sums of tiles, and those left over stop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from mpq.formats.format import Format, get_format
from mpq.formats.quantize import quantize, scale_of
from mpq.formats.scheme import get_scheme
from mpq.kernels import bgemm, scaled
from mpq.kernels.block_codes import Operand, weights_in_blocks
from mpq.kernels.fp8 import DTYPES, cast

Grouped: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # rows (S, K) and ends (E) -> (S, C)


def experts(
    weights: Tensor, scheme: str, perturb_input: float = 1.0, perturb_weight: float = 1.0
) -> Grouped:
    """The product of rows with the `weights` (E, C, K) of all experts, which are converted once, in a scheme of INT8, of FP8, or
    of FP8 in blocks; in x's dtype, without a bias. `perturb_*` multiply the scales."""
    held = operand_of(weights.detach(), get_scheme(scheme).weights, perturb_weight)
    channels = weights.shape[1]

    def forward(x: Tensor, ends: Tensor) -> Tensor:
        y: Tensor = _grouped_op(x, ends, held.codes, held.scales, scheme, perturb_input, channels)
        return y

    return forward


def operand_of(weights: Tensor, fmt: Format, perturb: float = 1.0) -> Operand:
    """Codes (E, C up, K up) and FP32 scales of weights (E, C, K): (E, C up), or of blocks (E, C up / 128, K up / 128)."""
    if fmt.by_blocks:
        each = [weights_in_blocks(w, fmt, perturb, bgemm.WIDE) for w in weights]
    else:
        up = (0, -weights.shape[2] % bgemm.PADDING, 0, -weights.shape[1] % scaled.MULTIPLE)
        each = []
        for weight in (nn.functional.pad(w, up) for w in weights):
            scale = scale_of(weight, fmt, "row") * perturb
            each.append(Operand(quantize(weight, fmt, scale), scale.flatten()))
    return Operand(torch.stack([e.codes for e in each]), torch.stack([e.scales for e in each]))


def _grouped(
    x: Tensor,
    ends: Tensor,
    codes: Tensor,
    scales: Tensor,
    scheme: str,
    perturb_input: float,
    channels: int,
) -> Tensor:
    read = scaled.activations_beside(get_scheme(scheme).weights)
    a, b = scaled.operand(x, read, perturb_input), Operand(codes, scales)
    if read == get_format("fp8_e4m3") and _by_torch(x.device):
        return torchs_product(a, b, ends)[:, :channels].to(x.dtype)
    return product(a, b, ends, channels, x.dtype, blocks=read.by_blocks)


# one operation to torch.compile, which would otherwise look into the launches
_grouped_op = torch.library.custom_op("mpq::grouped_linear", _grouped, mutates_args=())


@_grouped_op.register_fake
def _(
    x: Tensor,
    ends: Tensor,
    codes: Tensor,
    scales: Tensor,
    scheme: str,
    perturb_input: float,
    channels: int,
) -> Tensor:
    return x.new_empty(len(x), channels)


def _by_torch(device: torch.device) -> bool:
    """Whether torch has a grouped product of FP8 rows there."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


def torchs_product(a: Operand, b: Operand, ends: Tensor) -> Tensor:
    """(S, C up) in BF16 of FP8 codes with a scale a row; fast accumulation as in linears (cuda.py)."""
    y: Tensor = torch._scaled_grouped_mm(
        a.codes,
        b.codes.mT,
        a.scales,
        b.scales,
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y


def product(
    a: Operand, b: Operand, ends: Tensor, channels: int, dtype: torch.dtype, blocks: bool
) -> Tensor:
    """(S, C) in `dtype` of codes a (S, K) and b (E, C up, K), K a multiple of bgemm.PADDING, and FP32 scales, (S) and (E, C up),
    or with `blocks`, for which K and C up are multiples of bgemm.WIDE, (K / WIDE, S) and (E, C up / WIDE, K / WIDE)."""
    (rows, k), (count, high, _) = a.codes.shape, b.codes.shape
    out = torch.empty(rows, channels, dtype=dtype, device=a.codes.device)
    if not rows:
        return out
    block_m, block_n = 128 if rows >= 128 * count else 64, 64
    tiles = torch.diff(ends, prepend=ends.new_zeros(1)) + (block_m - 1)
    tiles = tiles.div(block_m, rounding_mode="floor").cumsum(0, dtype=torch.int32)
    grid = ((rows // block_m + count) * triton.cdiv(channels, block_n),)
    _grouped_kernel[grid](
        a.codes,
        b.codes,
        out,
        a.scales,
        b.scales,
        ends,
        tiles,
        count,
        rows,
        channels,
        high,
        k,
        OUT=DTYPES[dtype],
        SUM=tl.int32 if a.codes.dtype == torch.int8 else tl.float32,
        BLOCKS=blocks,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=bgemm.WIDE if blocks or not k % bgemm.WIDE else bgemm.PADDING,
        EXPERTS=max(16, triton.next_power_of_2(count)),
        num_warps=8 if block_m == 128 else 4,
        num_stages=4,
    )
    return out


@triton.jit
def _grouped_kernel(
    a,
    b,
    out,
    a_scale,
    b_scale,
    ends,
    tiles,
    count,
    m,
    n,
    high,
    k,
    OUT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    across = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0) // across  # tiles of the same rows follow each other
    each = tl.arange(0, EXPERTS)
    through = tl.load(tiles + each, mask=each < count, other=2147483647)
    expert = tl.sum((through <= tile).to(tl.int32), 0)
    if expert < count:
        before = tl.load(tiles + expert - 1, mask=expert > 0, other=0)
        start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends + expert)
        row = start + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
        # rows past the expert's are read as others and never written
        from_a = tl.minimum(row, m - 1).to(tl.int64)
        from_b = expert.to(tl.int64) * high + column % n
        total = bgemm.summed(a, b, a_scale, b_scale, from_a, from_b, m, k, SUM, BLOCKS, BLOCK_K)
        place = out + row.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(place, cast(total, OUT), mask=(row < end)[:, None] & (column < n)[None, :])
