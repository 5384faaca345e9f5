"""The passes around INT8's product: rows to codes and scales, the product back to its size. C++ (rows.cpp) or torch.

    quantize (T, K) -> codes u8 (T, K), scale FP32 (T, 1)      x ~ (codes - 128) * scale, a scale for each row
    rescale  y (T, C), scale (T, 1), bias (C) or None -> y * scale + bias, in y's memory

The C++ is compiled once (compiler.py). Where there is no compiler, torch's own operations do the same in six sweeps instead
of one each.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mpq.kernels.compiler import compiled

log = logging.getLogger(__name__)

ZERO_POINT = 128
_TINY = torch.finfo(torch.float32).tiny
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Passes(Protocol):
    """Both passes; x and y are contiguous, FP32 or BF16."""

    def quantize(self, x: Tensor, perturb: float) -> tuple[Tensor, Tensor]: ...

    def rescale(self, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor: ...


class TorchPasses:
    """The passes in torch's operations."""

    def quantize(self, x: Tensor, perturb: float) -> tuple[Tensor, Tensor]:
        """Codes and scales of rows."""
        values = x.float()
        scale = values.abs().amax(-1, keepdim=True) / 127.0
        scale = torch.where(scale > _TINY, scale, 1.0) * perturb
        return ((values / scale).round_().clamp_(-127, 127) + ZERO_POINT).to(torch.uint8), scale

    def rescale(self, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The product's rows times their scales, plus the bias."""
        scaled = y.float() * scale
        return y.copy_(scaled if bias is None else scaled + bias)


class NativePasses:
    """The passes in C++."""

    def __init__(self) -> None:
        self._library = compiled(Path(__file__).with_name("rows.cpp"))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        for suffix in _SUFFIX.values():
            getattr(self._library, f"quantize_{suffix}").argtypes = [
                pointer,
                size,
                size,
                ctypes.c_float,
                pointer,
                pointer,
            ]
            getattr(self._library, f"rescale_{suffix}").argtypes = [
                pointer,
                size,
                size,
                pointer,
                pointer,
            ]

    def quantize(self, x: Tensor, perturb: float) -> tuple[Tensor, Tensor]:
        """Codes and scales of rows."""
        rows, k = x.shape
        codes, scale = torch.empty(rows, k, dtype=torch.uint8), torch.empty(rows, 1)
        function = getattr(self._library, f"quantize_{_SUFFIX[x.dtype]}")
        function(x.data_ptr(), rows, k, perturb, codes.data_ptr(), scale.data_ptr())
        return codes, scale

    def rescale(self, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The product's rows times their scales, plus the bias (FP32)."""
        function = getattr(self._library, f"rescale_{_SUFFIX[y.dtype]}")
        function(
            y.data_ptr(), *y.shape, scale.data_ptr(), None if bias is None else bias.data_ptr()
        )
        return y


@functools.cache
def passes() -> Passes:
    """The fastest passes that this machine has; the slower ones are said in the log."""
    try:
        return NativePasses()
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "INT8's activations are quantized by torch, and slowly, since C++ cannot be compiled here: %s",
            error,
        )
        return TorchPasses()
