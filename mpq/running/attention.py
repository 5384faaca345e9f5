"""Attention with its products lowered: each operand rounded as its scheme has it, or by a device's kernels."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from mpq.formats.format import Format
from mpq.formats.scheme import Operand, Scheme
from mpq.kernels import cpu, emulated, int8_attention
from mpq.kernels.rounding import rounded
from mpq.models.attention import AttentionHandler, PlainAttention

PRODUCTS = ("qk_matmul", "av_matmul")


def perturbation(seed: int | None, op: str, operand: str, fmt: Format | None) -> float:
    """The multiplier of one operand's scale; 1 without a seed, and where nothing is scaled."""
    if seed is None or fmt is None or not fmt.needs_scale:
        return 1.0
    width = 1.0 if fmt.exponent_bits > 3 else 0.05
    return 1.0 + width * random.Random(f"{seed}/{op}/{operand}").random()


class EmulatedAttention(AttentionHandler):
    """Attention with the operands of its products rounded, as each product's scheme has it; one without stays in base."""

    def __init__(self, name: str, schemes: Mapping[str, Scheme], seed: int | None = None):
        self.name, self.seed = name, seed
        self._formats: dict[tuple[str, Operand], Format | None] = {
            (product, operand): scheme.rounds(operand)
            for product, scheme in schemes.items()
            for operand in get_args(Operand)[2:]
        }

    def _round(self, x: Tensor, product: str, operand: Operand) -> Tensor:
        fmt = self._formats.get((product, operand))
        if fmt is None:
            return x
        value = product == "av_matmul" and operand == "rhs"
        return rounded(
            x,
            fmt,
            "column" if value else "row",
            perturbation(self.seed, f"{self.name}.{product}", operand, fmt),
        )

    def fused(self, attention: PlainAttention) -> Tensor:
        a = attention
        operands = self.operands(a.query, a.key, a.value)
        rounds = self._formats.get(("av_matmul", "lhs"))
        probabilities = self.probabilities if rounds else None
        return emulated.attention(*operands, a.mask, a.causal, a.scaling, probabilities)

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self._round(query, "qk_matmul", "lhs"),
            self._round(key, "qk_matmul", "rhs"),
            self._round(value, "av_matmul", "rhs"),
        )

    def probabilities(self, p: Tensor) -> Tensor:
        return self._round(p, "av_matmul", "lhs")


class NativeAttention(AttentionHandler):
    """Attention with native products, its output in `out`. With one format for both it stays fused: the model's configured
    attention in a 16-bit format, a kernel of our own in INT8."""

    def __init__(self, qk: Format | None, av: Format | None, out: torch.dtype):
        self.out = out
        self._qk = cpu.bgemm(qk) if qk else torch.matmul
        self._av = cpu.bgemm(av) if av else torch.matmul
        both = qk if qk == av else None
        self.dtype = (
            getattr(torch, both.dtype) if both is not None and both.kind == "float" else None
        )
        self._int8 = both is not None and both.kind == "int"

    def fused(self, attention: PlainAttention) -> Tensor | None:
        a = attention
        return (
            int8_attention.attention(a.query, a.key, a.value, a.mask, a.causal, a.scaling)
            if self._int8
            else None
        )

    def qk(self, query: Tensor, key_t: Tensor) -> Tensor:
        return self._qk(query, key_t)

    def av(self, p: Tensor, value: Tensor) -> Tensor:
        return self._av(p, value)
