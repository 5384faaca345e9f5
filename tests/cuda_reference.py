"""For the tests of CUDA's kernels: the device they run on, numbers for them, and how far two results are apart."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mpq.formats.format import get_format

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = get_format("fp8_e4m3")


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers on the device whose rows, along the last dimension but one, differ a hundredfold in size."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))
    return (x * torch.logspace(-1, 1, shape[-2])[:, None]).to(DEVICE, dtype)


def error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖; infinite where anything is not finite."""
    difference = float((got.double() - want.double()).norm() / want.double().norm())
    return difference if np.isfinite(difference) else float("inf")


def epsilon(dtype: torch.dtype) -> float:
    """How far a result may be off that was computed in FP32 and rounded to `dtype`."""
    return max(torch.finfo(dtype).eps, 1e-6)
