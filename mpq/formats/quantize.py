"""Scales, rounding and its undoing, for every format and granularity. Pure functions on tensors.

A tensor is stored as `q` with `scale`, and reads back as q · scale. The scale maps the largest magnitude of its
neighbourhood onto the top of the format:

    tensor   one scale
    row      one per slice along the last dimension: a token's activations, a weight's output channel
    column   one per slice along the last but one: the second operand of a BGEMM, (..., K, N), whose K is summed over

A format whose scale is of the whole tensor has that one whatever is asked for.
In a format with blocks a row is cut into them, and the last one may be short: `blocks_of` lays each block out as a row of
its own, and what is true of rows is true of blocks. Formats of 16 bits and more take no scale. Rounding is to nearest,
ties to even, saturating at the format's ends: the casts of torch for FP8 do not saturate by themselves (E4M3 overflows to
NaN, E5M2 to infinity).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.errors import MpqError
from mpq.formats.format import Format, NoiseModel

Granularity = Literal["tensor", "row", "column"]
_TINY = torch.finfo(torch.float32).tiny
_E4M3_MAX = 448.0
_PARTS = [
    1 - k / 32 for k in range(1, 17)
]  # of the largest magnitude, which fitted scales map onto the top
_LEAST = 0.125  # what compressed-tensors 0.20 takes for a block scale that is 0 in E4M3


def blocks_of(x: Tensor, fmt: Format) -> Tensor:
    """`x` (…, R, K) with each block of `fmt` a row of its own: (…, R, K / columns, columns), and of blocks of several rows
    (…, R / rows, K / columns, rows · columns). Zeros fill the last blocks up. A view where it can be one."""
    rows, columns = fmt.block
    x = F.pad(x, (0, -x.shape[-1] % columns)).unflatten(-1, (-1, columns))
    if rows == 1:
        return x
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[-3] % rows)).unflatten(-3, (-1, rows))
    return x.transpose(-3, -2).flatten(-2)


def from_blocks(blocks: Tensor, fmt: Format, shape: torch.Size) -> Tensor:
    """The tensor of `shape` that blocks_of laid out."""
    rows, columns = fmt.block
    if rows > 1:
        blocks = blocks.unflatten(-1, (rows, columns)).transpose(-3, -2).flatten(-4, -3)
        blocks = blocks[..., : shape[-2], :, :]
    return blocks.flatten(-2)[..., : shape[-1]]


def amax_of(x: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """The largest magnitude of each neighbourhood of `x`, FP32, shaped to broadcast over it."""
    if granularity == "tensor":
        return x.abs().amax().reshape((1,) * x.ndim).float()
    return x.abs().amax(dim=-1 if granularity == "row" else -2, keepdim=True).float()


def share_of(x: Tensor, fmt: Format) -> float:
    """What the scales of blocks are multiplied by before they are stored in E4M3, for the whole of `x`; 1 in other formats.

    It is what compressed-tensors calls the global scale, the power of two at or below its 448 · top / amax. A float's rounding
    does not see powers of two: blocks round alike whatever lies beside them in the tensor, a batch's other tokens or the
    weights of a fused layer, as long as their own scales are not subnormal.
    """
    if fmt.scale != "e4m3":
        return 1.0
    return share_under(
        max(map(abs, map(float, x.aminmax()))) if x.numel() else 0.0, fmt
    )  # no copy of |x|


def share_under(largest: float, fmt: Format) -> float:
    """share_of a tensor whose largest magnitude is given, in a format whose scales are stored in E4M3."""
    if not _TINY < largest < math.inf:
        return 1.0
    _, exponent = math.frexp(_E4M3_MAX * fmt.top / largest)
    return 2.0 ** min(exponent - 1, 127)


def scale_of(
    x: Tensor, fmt: Format, granularity: Granularity = "tensor", share: float | None = None
) -> Tensor:
    """The FP32 scale of each neighbourhood of `x`, as it is stored, shaped to broadcast over it; 1 where all is zero.

    A fitted one is, of those that map the neighbourhood's largest magnitude, or 31/32, 30/32 … 1/2 of it, onto the top
    and cut what is above, that of the least squared error.

    Of a format with blocks, `x` is blocks_of the tensor, and `share` the tensor's share_of where `x` is a part of it.
    """
    largest = amax_of(x, granularity)
    share = share_of(x, fmt) if share is None else share
    scale = _stored(largest, fmt, share)
    if fmt.fit == "max":
        return scale
    along = {"tensor": tuple(range(x.ndim)), "row": (-1,), "column": (-2,)}[granularity]
    least = _squared_error(x, fmt, scale, along)
    for part in _PARTS:
        other = _stored(largest * part, fmt, share)
        error = _squared_error(x, fmt, other, along)
        scale = torch.where(error < least, other, scale)
        least = torch.minimum(error, least)
    return scale


def _squared_error(x: Tensor, fmt: Format, scale: Tensor, along: tuple[int, ...]) -> Tensor:
    error = dequantize(quantize(x, fmt, scale), fmt, scale) - x.float()
    return error.square_().sum(along, keepdim=True)


def _stored(largest: Tensor, fmt: Format, share: float) -> Tensor:
    """The scale that maps `largest` onto the format's top, as it is stored."""
    if fmt.scale == "e8m0":
        return _power_of_two(largest, fmt)
    scale = largest / fmt.top
    if fmt.scale == "e4m3":
        of_block = (scale * share).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
        return torch.where(of_block > 0, of_block, _LEAST) / share
    if fmt.scale == "bf16":
        scale = scale.bfloat16().float()
    # below `tiny` the division x / scale would overflow; such a neighbourhood rounds to zero either way
    return torch.where(scale > _TINY, scale, torch.ones_like(scale))


def _power_of_two(largest: Tensor, fmt: Format) -> Tensor:
    """2^(floor(log2 of the largest) − that of the format's top), an E8M0 scale; one power more where the largest,
    with 1.75 of its own power or more, would be cut to the format's maximum (compressed-tensors 0.20, mxfp_utils)."""
    bits = largest.view(torch.int32) + 0x00200000
    exponent = (bits >> 23) - 127 - math.frexp(fmt.top)[1] + 1
    exact = torch.ldexp(torch.ones_like(largest), exponent.clamp(-126, 127))
    return torch.where(largest > _TINY, exact, torch.ones_like(largest))


def quantize(x: Tensor, fmt: Format, scale: Tensor | None = None) -> Tensor:
    """`x / scale` rounded into the format and stored in its dtype. A NaN stays a NaN where the format has one."""
    dtype = getattr(torch, fmt.dtype)
    if not fmt.needs_scale:
        return x.to(dtype)
    scaled = x.float() if scale is None else x.float() / scale
    scaled = scaled.clamp(fmt.lowest, fmt.maximum)
    if fmt.kind == "int":
        return scaled.round().to(dtype)
    if dtype != torch.float32:
        return scaled.to(dtype)
    # as many steps as the value's binade has, the smallest normals' below them; all exact in FP32
    step = binade(scaled).clamp(min=2.0**fmt.min_normal_exponent) * 2.0**-fmt.mantissa_bits
    return (scaled / step).round() * step


def dequantize(
    q: Tensor, fmt: Format, scale: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values that `q` stands for, in `dtype`."""
    values = q.float() if scale is None or not fmt.needs_scale else q.float() * scale
    return values.to(dtype)


def fake_quantize(
    x: Tensor,
    fmt: Format,
    granularity: Granularity = "tensor",
    perturb: float = 1.0,
    share: float | None = None,
) -> Tensor:
    """`x` after a round trip through the format, in its own dtype.

    `perturb` multiplies the scale before rounding: it moves every rounding point and so draws new rounding errors from
    the same distribution (method.md, "Strategies and evaluation"). Formats without a scale have nothing to perturb.
    `share` is that of the tensor that `x` is a part of (share_of). Raises MpqError for blocks along anything but rows.
    """
    if not fmt.needs_scale:
        return x.to(getattr(torch, fmt.dtype)).to(x.dtype)
    if not fmt.by_blocks:
        granularity = "tensor" if fmt.of_tensor else granularity
        scale = scale_of(x, fmt, granularity) * perturb
        return dequantize(quantize(x, fmt, scale), fmt, scale, x.dtype)
    if granularity != "row":
        raise MpqError(
            f"{fmt.name} has blocks along rows: a scale for each {granularity} has none."
        )
    blocks = blocks_of(x, fmt)
    scale = scale_of(blocks, fmt, "row", share_of(x, fmt) if share is None else share) * perturb
    return from_blocks(dequantize(quantize(blocks, fmt, scale), fmt, scale, x.dtype), fmt, x.shape)


def binade(u: Tensor) -> Tensor:
    """2^floor(log2|u|), and 0 at 0, in FP32: the exponent field with the mantissa cleared. Subnormals count as 0."""
    bits = u.float().view(torch.int32) & 0x7F800000
    return bits.view(torch.float32)


def noise_variance(
    u: Tensor, fmt: Format, noise_model: NoiseModel, granularity: Granularity = "row"
) -> Tensor:
    """Variance of the rounding error of each element of `u`, in FP32; of `actual` the squared error itself.

    `granularity` matters to integers, and to `actual`. Source: eq. 18 for `paper`, method.md "Noise per format" for
    `ulp` and the integers, "KL and the rounding that happens" for `actual`.
    """
    if noise_model == "actual":
        return (fake_quantize(u, fmt, granularity).float() - u.float()).square()
    if fmt.kind == "int":
        return ((amax_of(u, granularity) / fmt.top) ** 2 / 12).expand(u.shape)
    magnitude = u.float() if noise_model == "paper" else binade(u)
    return magnitude**2 * fmt.relative_variance
