"""What plans really do to a text, measured one after the other: fidelity.py, peers/compare.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mpq.loss.cross_entropy import log_probabilities, of_labels
from mpq.models.blocks import Blocks
from mpq.models.loading import load_model
from mpq.running.apply import Mixed

BASE, AT_ONCE = "fp32", 2048  # tokens
Plan = dict[str, str]  # op → format; base where it is not named, or called `base`


@dataclass(frozen=True)
class Effect:
    """KL divergence from base (nats per token); mean change of the blocks' loss (nats), and its mean square (nats²);
    perplexity."""

    kl: float
    loss_change: float
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
        self._batches = list(blocks.batches(max(1, AT_ONCE // blocks.tokens.shape[1])))
        with torch.inference_mode():
            self._base = [log_probabilities(model, tokens) for tokens in self._batches]

    def effect(self, plan: Plan) -> Effect:
        lowered = tuple(sorted((op, f) for op, f in plan.items() if f not in ("base", BASE)))
        if lowered not in self._seen:
            self._seen[lowered] = self._measured(dict(lowered))
        return self._seen[lowered]

    @torch.inference_mode()
    def _measured(self, formats: Plan) -> Effect:
        kls, changes, losses = [], [], []
        self._mixed.set(formats)
        for tokens, p in zip(self._batches, self._base, strict=True):
            q = log_probabilities(self._model, tokens)
            kls.append((p.exp() * (p - q)).sum(-1).mean(1).double())
            before, after = (-of_labels(x, tokens[:, 1:]).mean(1).double() for x in (p, q))
            changes.append(after - before)
            losses.append(after)
        kl, change, loss = (torch.cat(of) for of in (kls, changes, losses))
        means = (kl.mean(), change.mean(), change.square().mean(), loss.mean().exp())
        return Effect(*map(float, means))
