"""Scales, rounding and its undoing, for every format and granularity. Pure functions on tensors.

A tensor is stored as `q` with `scale`, and reads back as q · scale. The scale maps the largest magnitude of its
neighbourhood onto the largest value of the format:

    tensor   one scale
    row      one per slice along the last dimension: a token's activations, a weight's output channel
    column   one per slice along the last but one: the second operand of a BGEMM, (..., K, N), whose K is summed over

Formats of 16 bits and more take no scale. Rounding is to nearest, ties to even, saturating at the format's maximum:
the casts of torch for FP8 do not saturate by themselves (E4M3 overflows to NaN, E5M2 to infinity).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mpq.formats.format import Format, NoiseModel

Granularity = Literal["tensor", "row", "column"]
_TINY = torch.finfo(torch.float32).tiny


def amax_of(x: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """The largest magnitude of each neighbourhood of `x`, FP32, shaped to broadcast over it."""
    if granularity == "tensor":
        return x.abs().amax().reshape((1,) * x.ndim).float()
    return x.abs().amax(dim=-1 if granularity == "row" else -2, keepdim=True).float()


def scale_of(x: Tensor, fmt: Format, granularity: Granularity = "tensor") -> Tensor:
    """The FP32 scale amax / maximum of `x`, shaped to broadcast over it; 1 where everything is zero."""
    scale = amax_of(x, granularity) / fmt.maximum
    # below `tiny` the division x / scale would overflow; such a neighbourhood rounds to zero either way
    return torch.where(scale > _TINY, scale, torch.ones_like(scale))


def quantize(x: Tensor, fmt: Format, scale: Tensor | None = None) -> Tensor:
    """`x / scale` rounded into the format and stored in its dtype. A NaN stays a NaN where the format has one."""
    dtype = getattr(torch, fmt.dtype)
    if not fmt.needs_scale:
        return x.to(dtype)
    scaled = x.float() if scale is None else x.float() / scale
    scaled = scaled.clamp(-fmt.maximum, fmt.maximum)
    return (scaled.round() if fmt.kind == "int" else scaled).to(dtype)


def dequantize(
    q: Tensor, fmt: Format, scale: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values that `q` stands for, in `dtype`."""
    values = q.float() if scale is None or not fmt.needs_scale else q.float() * scale
    return values.to(dtype)


def fake_quantize(
    x: Tensor, fmt: Format, granularity: Granularity = "tensor", perturb: float = 1.0
) -> Tensor:
    """`x` after a round trip through the format, in its own dtype.

    `perturb` multiplies the scale before rounding: it moves every rounding point and so draws new rounding errors from
    the same distribution (method.md, "Strategies and evaluation"). Formats without a scale have nothing to perturb.
    """
    if not fmt.needs_scale:
        return x.to(getattr(torch, fmt.dtype)).to(x.dtype)
    scale = scale_of(x, fmt, granularity) * perturb
    return dequantize(quantize(x, fmt, scale), fmt, scale, x.dtype)


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
        return ((amax_of(u, granularity) / fmt.maximum) ** 2 / 12).expand(u.shape)
    magnitude = u.float() if noise_model == "paper" else binade(u)
    return magnitude**2 * fmt.relative_variance
