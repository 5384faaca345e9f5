"""What a plan really does to the loss: per-sample losses under real quantization against those of the base model."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl
import torch
from torch import nn

from mpq.errors import MpqError
from mpq.loss.cross_entropy import sample_losses
from mpq.models.blocks import Blocks
from mpq.models.positions import check_length
from mpq.running.apply import apply_plan

log = logging.getLogger("mpq")

LOSS_METRICS = ("loss_mse", "loss_drift", "loss", "perplexity")


def losses(model: nn.Module, blocks: Blocks, batch: int = 8) -> np.ndarray:
    """g_i of every block, (samples,) float64, in nats per token.

    Raises MpqError where one is not finite, and for blocks longer than the model's learned positions.
    """
    check_length(model.config, blocks.tokens.shape[1])
    device = str(next(model.parameters()).device)
    with torch.inference_mode():
        all_losses = torch.cat(
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
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Metrics of a plan, a row for each seed and metric: columns seed, metric, value, base_value.

    `loss_mse` (nats²) is the mean of (ĝ_i − g_i)², beside E[g²]; `loss_drift` (nats) the mean of ĝ_i − g_i, beside 0;
    `loss` and `perplexity` stand beside the base model's. Each seed perturbs the scales before quantization (Sec. 3).
    """
    rows: list[dict[str, object]] = []
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
