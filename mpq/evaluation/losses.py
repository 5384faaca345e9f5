"""What a plan really does to the loss: per-sample losses under real quantization against those of the base model."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.loss.cross_entropy import log_probabilities, sample_losses
from mpq.models.blocks import Blocks
from mpq.models.placement import device_of
from mpq.models.positions import check_length
from mpq.running.apply import Mixed, apply_plan

log = logging.getLogger("mpq")

KEPT_BYTES = 2**29
LOSS_METRICS = ("loss_mse", "loss_drift", "loss", "perplexity")


def losses(model: nn.Module, blocks: Blocks, batch: int = 8) -> np.ndarray:
    """g_i of every block, (samples,) float64, in nats per token.

    Raises MpqError where one is not finite, and for blocks longer than the model's learned positions.
    """
    check_length(model.config, blocks.tokens.shape[1])
    device = str(device_of(model))
    with torch.inference_mode():
        all_losses: np.ndarray = torch.cat(
            [
                sample_losses(model, tokens).double().cpu()
                for tokens in blocks.batches(batch, device)
            ]
        ).numpy()
    if not np.isfinite(all_losses).all():
        at = int(np.flatnonzero(~np.isfinite(all_losses))[0])
        raise MpqError(
            f"The loss of evaluation sample {at} is {all_losses[at]}: a format overflows or the model is broken there."
        )
    return all_losses


def base_predictions(model: nn.Module, blocks: Blocks, batch: int = 8) -> list[Tensor] | None:
    """The base model's log-probabilities for `divergences` of many plans on one text: (batch, length - 1, vocabulary) FP32 each.

    None where they take more than KEPT_BYTES: each plan then has base run beside it.
    """
    check_length(model.config, blocks.tokens.shape[1])
    kept: list[Tensor] = []
    with torch.inference_mode():
        for tokens in blocks.batches(batch, str(device_of(model))):
            kept.append(log_probabilities(model, tokens))
            if kept[0][0].nbytes * len(blocks.tokens) > KEPT_BYTES:
                return None
    return kept


def divergences(
    model: nn.Module,
    formats: Mapping[str, str],
    blocks: Blocks,
    *,
    base: str,
    batch: int = 8,
    predicted: Sequence[Tensor] | None = None,
) -> np.ndarray:
    """KL divergence (nats per predicted token) of a plan's predictions from base's on each block, (samples,) float64, as
    the plan runs: at the kernels' own scales, which no seed perturbs.

    Σ p (ln p − ln p̂) over the vocabulary, p base's probabilities and p̂ the plan's: `predicted` of base_predictions, or both
    run batch by batch, so that no more than a batch of logits is kept. Raises MpqError where it is not finite.
    """
    check_length(model.config, blocks.tokens.shape[1])
    device = str(device_of(model))
    mixed, found = Mixed(model, base=base, backend="emulated"), []
    try:
        with torch.inference_mode():
            for at, tokens in enumerate(blocks.batches(batch, device)):
                if predicted is None:
                    mixed.clear()
                    p = log_probabilities(model, tokens)
                else:
                    p = predicted[at]
                mixed.set(formats)
                q = log_probabilities(model, tokens)
                # a label that base rules out adds nothing, whatever the plan makes of it
                terms = torch.where(p == -math.inf, 0.0, p.exp() * q.neg_().add_(p))
                found.append(terms.sum(-1).mean(dim=1))
    finally:
        mixed.clear()
    of_blocks: np.ndarray = torch.cat(found).double().cpu().numpy()
    if not np.isfinite(of_blocks).all():
        raise MpqError(
            f"The KL divergence from base is {of_blocks.mean()}: a format overflows or the model is broken there."
        )
    return of_blocks


def perplexity(of_losses: np.ndarray) -> float:
    """exp of the mean loss; infinity, with a warning, where that is more than a float holds (709 nats)."""
    mean = float(of_losses.mean())
    if mean <= math.log(sys.float_info.max):
        return math.exp(mean)
    log.warning("A mean loss of %.0f nats has no finite perplexity: it is given as infinite.", mean)
    return math.inf


def evaluate_loss(
    model: nn.Module,
    formats: Mapping[str, str],
    blocks: Blocks,
    base_losses: np.ndarray,
    *,
    base: str,
    seeds: Sequence[int],
    batch: int = 8,
    kl: bool = True,
    predicted: Sequence[Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Metrics of a plan, a row for each seed and metric: columns seed, metric, value, base_value.

    `loss_mse` (nats²) is the mean of (ĝ_i − g_i)², beside E[g²]; `loss_drift` (nats) the mean of ĝ_i − g_i, beside 0;
    `loss` and `perplexity` stand beside the base model's. Each seed perturbs the scales before quantization (Sec. 3).
    With `kl`, a row for the first seed says the KL divergence from base (`divergences`), beside 0: that of the plan
    unperturbed. A perturbed scale moves the largest element off its code, and in attention's P, whose largest is most of
    a row, that error is the same all over. `predicted` is as in `divergences`.
    """
    rows: list[dict[str, object]] = []
    if kl:
        value = float(
            divergences(model, formats, blocks, base=base, batch=batch, predicted=predicted).mean()
        )
        rows.append({"seed": seeds[0], "metric": "kl", "value": value, "base_value": 0.0})
    for done, seed in enumerate(seeds):
        with apply_plan(model, formats, base=base, backend="emulated", seed=seed):
            lowered = losses(model, blocks, batch)
        change = lowered - base_losses
        values = (np.square(change).mean(), change.mean(), lowered.mean(), perplexity(lowered))
        beside = (
            np.square(base_losses).mean(),
            0.0,
            base_losses.mean(),
            perplexity(base_losses),
        )
        rows += [
            {"seed": seed, "metric": metric, "value": float(value), "base_value": float(base_value)}
            for metric, value, base_value in zip(LOSS_METRICS, values, beside, strict=True)
        ]
        if progress:
            progress(done + 1, len(seeds))
    return pl.DataFrame(
        rows,
        schema={
            "seed": pl.Int64,
            "metric": pl.String,
            "value": pl.Float64,
            "base_value": pl.Float64,
        },
    )
