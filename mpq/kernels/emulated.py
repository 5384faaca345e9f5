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

from mpq.formats.scheme import Scheme
from mpq.kernels.rounding import rounded

Linear: TypeAlias = Callable[[Tensor], Tensor]
Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Rounding: TypeAlias = Callable[[Tensor], Tensor]
BLOCK = 2**17  # scores at a time on a CPU: with P and what P is rounded to they stay in its cache


def linear(
    weight: Tensor,
    bias: Tensor | None,
    scheme: Scheme,
    perturb_input: float = 1.0,
    perturb_weight: float = 1.0,
) -> Linear:
    """`x (..., K) -> (..., C)` with x and `weight` (C, K) rounded as `scheme` says; the bias stays as it is.

    `perturb_*` multiply the scales before rounding (quantize.fake_quantize).
    """
    lowered = rounded(weight.detach(), scheme.weights, "row", perturb_weight)
    activations = scheme.activations

    def forward(x: Tensor) -> Tensor:
        if activations is not None:
            x = rounded(x, activations, "row", perturb_input)
        return torch.nn.functional.linear(x, lowered, bias)

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
    (batch, heads, length, width), (kv_heads, total) = query.shape, key.shape[1:3]
    shared = heads // kv_heads  # query heads that read one head of K and V
    if probabilities is None:
        grouped = (
            mask is None
        )  # as Transformers has it: with a mask CUDA has no fused kernel for heads that are shared
        if not grouped:
            key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        fused = torch.nn.functional.scaled_dot_product_attention
        output = fused(
            query,
            key,
            value,
            mask,
            is_causal=causal,
            scale=scaling,
            enable_gqa=grouped and shared > 1,
        )
        return output.transpose(1, 2).contiguous()
    if (
        mask is not None and mask.dtype == torch.bool
    ):  # where all is masked P is even, as in eager attention: not -inf
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    query, key = query.unflatten(1, (kv_heads, shared)), key.transpose(2, 3)
    output = query.new_empty(batch, length, kv_heads, shared, value.shape[-1])
    rows = length if query.device.type != "cpu" else max(16, BLOCK // (batch * heads * total))
    for start in range(0, length, rows):
        tokens = slice(start, min(start + rows, length))
        keys = slice(
            0, tokens.stop if causal else total
        )  # what no token of the block attends to is left out
        # the rows of all query heads that share a head of K make one product with it: K and V are not repeated
        block = query[:, :, :, tokens].reshape(batch, kv_heads, -1, width)
        scores = torch.matmul(block, key[..., keys]).mul_(scaling).view(batch, heads, -1, keys.stop)
        if causal:
            later = torch.ones(
                scores.shape[-2], scores.shape[-2], dtype=torch.bool, device=scores.device
            ).triu(1)
            scores[..., tokens].masked_fill_(later, -torch.inf)
        elif mask is not None:
            scores.add_(mask if mask.shape[-2] == 1 else mask[..., tokens, :])
        p = probabilities(torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype))
        product = torch.matmul(p.view(batch, kv_heads, -1, keys.stop), value[..., keys, :])
        output[:, tokens] = product.unflatten(2, (shared, -1)).permute(0, 3, 1, 2, 4)
    return output.flatten(2, 3)
