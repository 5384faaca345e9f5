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


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    probabilities: Rounding | None = None,
) -> Tensor:
    """softmax(scaling · Q Kᵀ + mask) V, (B, T, H, D_v), of operands that are rounded already; P goes through `probabilities`.

    query (B, H, T, D), key (B, H_kv, S, D), value (B, H_kv, S, D_v); mask and `causal` are SDPA's. Without `probabilities`
    torch's fused attention runs, as it does in base: only a P that is rounded has to exist.
    """
    batch, heads, length, _ = query.shape
    shared = heads // key.shape[1]  # query heads that read one head of K and V
    if probabilities is None:
        key, value = (x if shared == 1 else x.repeat_interleave(shared, 1) for x in (key, value))
        fused = torch.nn.functional.scaled_dot_product_attention
        return fused(query, key, value, mask, is_causal=causal, scale=scaling).transpose(1, 2).contiguous()
    # the rows of all query heads that share a head of K make one product with it: K and V are not repeated
    together = (batch, heads // shared, shared * length, -1)
    scores = torch.matmul(query.reshape(together), key.transpose(2, 3)).mul_(scaling).view(batch, heads, length, -1)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:  # where all is masked P is even, as eager attention has it: the lowest number, not -inf
        scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores.add_(mask)
    p = probabilities(torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype))
    return torch.matmul(p.reshape(together), value).view(batch, heads, length, -1).transpose(1, 2).contiguous()
