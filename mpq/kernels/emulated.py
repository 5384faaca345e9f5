"""Every format on every device: operands rounded to the format, the product computed in the model's own dtype.

For accuracy only: an emulated product is slower than the one that it stands for. Weights are rounded once, activations
at every call. Granularity is what native kernels use: a scale for each token of the activations and each output
channel of the weight; in attention one for each row of Q, K and P and each column of V: a kernel can only take scales out
of a sum that do not run along it, and P V sums over V's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from mpq.formats import Format
from mpq.quantize import Granularity, fake_quantize

Linear: TypeAlias = Callable[[Tensor], Tensor]
Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def linear(weight: Tensor, bias: Tensor | None, fmt: Format, perturb_input: float = 1.0, perturb_weight: float = 1.0) -> Linear:
    """`x (..., K) -> (..., C)` with x and `weight` (C, K) rounded to `fmt`; the bias stays as it is.

    `perturb_*` multiply the scales before rounding (quantize.fake_quantize).
    """
    rounded = fake_quantize(weight.detach(), fmt, "row", perturb_weight)

    def forward(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(fake_quantize(x, fmt, "row", perturb_input), rounded, bias)

    return forward


def bgemm(fmt: Format, rhs_granularity: Granularity = "column", perturb_lhs: float = 1.0, perturb_rhs: float = 1.0) -> Product:
    """`a (..., T, K) x b (..., K, N) -> (..., T, N)` with both operands rounded to `fmt`, a scale for each row of `a`.

    Kᵀ as the second operand of Q Kᵀ has one scale for each of its columns, the rows of K.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        lhs = fake_quantize(a, fmt, "row", perturb_lhs)
        return torch.matmul(lhs, fake_quantize(b, fmt, rhs_granularity, perturb_rhs))

    return product
