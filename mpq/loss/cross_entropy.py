"""The loss g of the method: mean cross entropy of each sample."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def sample_losses(model: nn.Module, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """g_i: mean cross entropy (nats) over the predicted tokens of each sample, padding left out.

    tokens (B, T) int64, attention_mask (B, T) or None; returns (B,) FP32. Source: method.md, "Loss-MSE sensitivity".
    """
    logits = model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    target = tokens[:, 1:]
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view(
        target.shape
    )
    if attention_mask is None:
        return loss.mean(dim=1)
    real = attention_mask[:, 1:].to(loss.dtype)
    return (loss * real).sum(dim=1) / real.sum(dim=1)
