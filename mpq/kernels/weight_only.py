"""Weights alone in INT8 or INT4 on a CPU, activations and products in base.

With few rows, decoding tokens say, a product's time is that of reading its weights: torch's kernels for packed weights read a half
or a quarter. With many they multiply more slowly than oneDNN does in BF16, so weights are decoded first, which
many rows share. Both are for BF16: in an FP32 base, where the packed kernels have no fast path, weights are always decoded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mpq.formats.format import Format
from mpq.formats.quantize import blocks_of, quantize, scale_of
from mpq.kernels.emulated import Linear

FEW = 32  # rows: up to so many read packed weights, more are faster with decoded ones (docs/log.md)
_LANES = 16  # output channels that the packed INT4 kernel takes at once
Multiply = Callable[[Tensor], Tensor]


def linear(weight: Tensor, bias: Tensor | None, fmt: Format, perturb_weight: float = 1.0) -> Linear:
    """`x (..., K) -> (..., C)` with `weight` (C, K) kept in `fmt`, INT8 with a scale a row or INT4 with one a group of a row.

    Codes are those of formats.quantize; `perturb_weight` multiplies their scales. A bias is added in base.
    """
    weight = weight.detach()
    few, decoded = (_int8 if fmt.bits == 8 else _int4)(weight, fmt, perturb_weight)

    def forward(x: Tensor, out: torch.dtype | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        packed = few is not None and x.dtype == torch.bfloat16 and len(rows) <= FEW
        y = few(rows.contiguous()) if few and packed else decoded(rows)
        if bias is not None:
            y = y + bias
        return y.to(out or x.dtype).view(*x.shape[:-1], weight.shape[0])

    return forward


def _int8(weight: Tensor, fmt: Format, perturb: float) -> tuple[Multiply | None, Multiply]:
    """Codes are multiplied as they are, and a row's scale, FP32, is that of an output."""
    scale = scale_of(weight, fmt, "row") * perturb
    codes, scale = quantize(weight, fmt, scale), scale.flatten()
    ones = torch.ones(len(codes), dtype=torch.bfloat16)

    def few(x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, codes, ones).float() * scale

    def decoded(x: Tensor) -> Tensor:
        if x.dtype == torch.float16:  # sums of codes overflow it
            return torch.nn.functional.linear(x, (codes * scale[:, None]).to(x.dtype))
        return torch.nn.functional.linear(x, codes.to(x.dtype)).float() * scale

    return few, decoded


def _int4(weight: Tensor, fmt: Format, perturb: float) -> tuple[Multiply | None, Multiply]:
    blocks, group = blocks_of(weight, fmt), fmt.block[1]
    scale = scale_of(blocks, fmt, "row") * perturb
    codes = quantize(blocks, fmt, scale)

    def decoded(x: Tensor) -> Tensor:
        values = (codes * scale).to(x.dtype).flatten(-2)[:, : x.shape[-1]]
        return torch.nn.functional.linear(x, values)

    if len(weight) % _LANES or weight.shape[1] % group:
        return None, decoded
    lifted = (codes.flatten(-2).to(torch.int32) + 8).contiguous()
    packed = torch._convert_weight_to_int4pack_for_cpu(lifted, 1)
    of_groups = scale.squeeze(-1).t()  # (groups, C), beside each its zero point
    with_zeros = torch.stack([of_groups, torch.zeros_like(of_groups)], -1).bfloat16().contiguous()

    def few(x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, packed, group, with_zeros)

    return few, decoded
