"""Native kernels of a CPU: FP32 and BF16 through casts and oneDNN's products."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.formats import Format
from mpq.kernels.emulated import Linear, Product
from mpq.quantize import quantize, scale_of


def linear(
    weight: Tensor, bias: Tensor | None, fmt: Format, perturb_input: float = 1.0, perturb_weight: float = 1.0
) -> Linear:
    """`x (..., K) -> (..., C)` computed in `fmt`, the output in x's dtype."""
    if fmt.kind == "int":
        return _int_mm_linear(weight, bias, fmt, perturb_input, perturb_weight)
    dtype = getattr(torch, fmt.dtype)
    cast = weight.detach().to(dtype)
    cast_bias = None if bias is None else bias.detach().to(dtype)

    def forward(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.to(dtype), cast, cast_bias).to(x.dtype)

    return forward


def bgemm(fmt: Format) -> Product:
    """`a (..., T, K) x b (..., K, N)` computed in `fmt`, the output in a's dtype."""
    dtype = getattr(torch, fmt.dtype)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a.to(dtype), b.to(dtype)).to(a.dtype)

    return product


def _int_mm_linear(weight: Tensor, bias: Tensor | None, fmt: Format, perturb_input: float, perturb_weight: float) -> Linear:
    scale = scale_of(weight.detach(), fmt, "row") * perturb_weight
    rounded, scale = quantize(weight.detach(), fmt, scale).t(), scale.flatten()

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        row_scale = scale_of(rows, fmt, "row") * perturb_input
        product = torch._int_mm(quantize(rows, fmt, row_scale), rounded).float() * row_scale * scale
        return (product if bias is None else product + bias).to(x.dtype).view(*x.shape[:-1], -1)

    return forward
