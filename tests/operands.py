"""Operands of products for the tests of kernels, drawn by seed, at odd sizes."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = [(1, 1, 1), (1, 33, 7), (5, 17, 19), (37, 64, 130), (128, 48, 1)]  # T, K, C


def tensors(
    t: int, k: int, c: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x (t, k) whose rows differ a hundredfold in size, a weight (c, k) and a bias (c,)."""
    g = torch.Generator().manual_seed(t + k + c)
    x = torch.randn(t, k, generator=g) * torch.logspace(-1, 1, t)[:, None]
    return (
        x.to(dtype),
        torch.randn(c, k, generator=g).to(dtype),
        torch.randn(c, generator=g).to(dtype),
    )


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
