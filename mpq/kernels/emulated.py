"""Every format on every device: operands rounded to the format, the product computed in the model's own dtype.

For accuracy only: an emulated product is slower than the one that it stands for. Weights are rounded once, activations
at every call. Granularity is what native kernels use: a scale for each token of the activations and each output
channel of the weight; in attention one for each row of Q, K and P, and for V one for each row, or for integers each
column, since an integer kernel can only take scales out of the sum that do not run along it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from mpq.attention import PlainAttention, additive_mask
from mpq.formats import Format
from mpq.kernels.rounding import rounded
from mpq.quantize import Granularity

Linear: TypeAlias = Callable[[Tensor], Tensor]
Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Rounding: TypeAlias = Callable[[Tensor], Tensor]


def value_granularity(fmt: Format) -> Granularity:
    """The granularity of V, (..., S, D), in P V: the sum runs over S."""
    return "column" if fmt.kind == "int" else "row"


def linear(weight: Tensor, bias: Tensor | None, fmt: Format, perturb_input: float = 1.0, perturb_weight: float = 1.0) -> Linear:
    """`x (..., K) -> (..., C)` with x and `weight` (C, K) rounded to `fmt`; the bias stays as it is.

    `perturb_*` multiply the scales before rounding (quantize.fake_quantize).
    """
    lowered = rounded(weight.detach(), fmt, "row", perturb_weight)

    def forward(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(rounded(x, fmt, "row", perturb_input), lowered, bias)

    return forward


def attention(a: PlainAttention, probabilities: Rounding | None) -> Tensor:
    """Attention over operands that are rounded already, (B, T, H, D_v), with P rounded by `probabilities` before P V.

    Without `probabilities` torch's fused attention runs, as it does in base: only a P that is rounded has to exist.
    """
    batch, heads, length, _ = a.query.shape
    shared = heads // a.key.shape[1]  # query heads that read one head of K and V
    if probabilities is None:
        key, value = (x if shared == 1 else x.repeat_interleave(shared, 1) for x in (a.key, a.value))
        fused = torch.nn.functional.scaled_dot_product_attention
        return fused(a.query, key, value, a.mask, is_causal=a.causal, scale=a.scaling).transpose(1, 2).contiguous()
    # the rows of all query heads that share a head of K make one product with it: K and V are not repeated
    together = (batch, heads // shared, shared * length, -1)
    scores = torch.matmul(a.query.reshape(together), a.key.transpose(2, 3)).mul_(a.scaling).view(batch, heads, length, -1)
    mask = additive_mask(a.query, a.key, a.mask, a.causal)
    if mask is not None:
        scores.add_(mask)
    p = probabilities(torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype))
    output = torch.matmul(p.reshape(together), a.value)
    return output.view(batch, heads, length, -1).transpose(1, 2).contiguous()
