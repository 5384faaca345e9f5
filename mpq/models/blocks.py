"""Tokens in blocks of one length: what a model is calibrated and evaluated on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Calibration or evaluation data: `tokens` (samples, length) int64, every one real (blocks are packed, not padded)."""

    tokens: np.ndarray

    @property
    def key(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(
            f"{self.tokens.shape}".encode() + np.ascontiguousarray(self.tokens, np.int64).tobytes()
        ).hexdigest()

    def shards(self, count: int) -> list[Blocks]:
        """At most `count` pieces of nearly equal size, in order."""
        return [Blocks(part) for part in np.array_split(self.tokens, min(count, len(self.tokens)))]

    def batches(self, size: int, device: str = "cpu") -> Iterator[Tensor]:
        """(≤ size, length) int64 tensors, in order."""
        for at in range(0, len(self.tokens), size):
            yield torch.from_numpy(np.ascontiguousarray(self.tokens[at : at + size])).to(device)
