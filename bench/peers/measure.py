"""The one evaluator: what a plan of any tool does to held-out text, under mpq's quantizers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from task import Plan, Task

from mpq.loss.cross_entropy import log_probabilities, of_labels
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import load_model
from mpq.running.apply import Mixed

BASE, BATCH = "fp32", 8


@dataclass(frozen=True)
class Effect:
    """KL divergence from base (nats per token), mean squared change of the blocks' loss (nats²), perplexity."""

    kl: float
    loss_mse: float
    perplexity: float


class Evaluator:
    """A checkpoint and a text; plans are measured one after the other, each once.

    Base's predictions are kept, and each op's rounded weights: a plan costs one forward pass. divergences of
    mpq.evaluation.losses gives the same KL (tests/test_peers.py).
    """

    def __init__(self, checkpoint: Path, blocks: Blocks) -> None:
        self.blocks, self._seen = blocks, dict[tuple[tuple[str, str], ...], Effect]()
        model = load_model(checkpoint, BASE)
        self._model, self._mixed = model, Mixed(model, base=BASE, backend="emulated")
        with torch.inference_mode():
            self._base = [log_probabilities(model, t) for t in blocks.batches(BATCH)]

    def effect(self, plan: Plan) -> Effect:
        lowered = tuple(sorted((op, f) for op, f in plan.items() if f != "base"))
        if lowered not in self._seen:
            self._seen[lowered] = self._measured(dict(lowered))
        return self._seen[lowered]

    @torch.inference_mode()
    def _measured(self, formats: Plan) -> Effect:
        kl, change, loss = 0.0, 0.0, 0.0
        self._mixed.set(formats)
        for tokens, p in zip(self.blocks.batches(BATCH), self._base, strict=True):
            q = log_probabilities(self._model, tokens)
            kl += float((p.exp() * (p - q)).sum(-1).mean(1).double().sum())
            before, after = (-of_labels(x, tokens[:, 1:]).mean(1).double() for x in (p, q))
            change += float((after - before).square().sum())
            loss += float(after.sum())
        n = len(self.blocks.tokens)
        return Effect(kl / n, change / n, math.exp(loss / n))

    def alone(self, task: Task) -> dict[tuple[str, str], float]:
        """The KL of each op lowered alone, in each format."""
        return {(op, f): self.effect({op: f}).kl for op in task.ops for f in task.formats}
