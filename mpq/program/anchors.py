"""The scale between predicted and measured KL, from plans that were measured: anchors, and what was chosen.

Predicted over measured KL is nearly one number on a text (0.76 to 0.86 on held-out text, method.md): what the calibration
text and second order leave out is alike for all plans. A few measured plans give that number, the median of measured /
predicted, and how far single plans stray from it. A mean would follow the one anchor that is off: everything in INT8, attention's
P too, cost 2.4 times what was predicted at 2048 tokens, and other plans what was (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, median, stdev

import polars as pl

from mpq.errors import MpqError

# what is known of the spread of ln(measured / predicted) beforehand, and how many plans that knowledge counts as
PRIOR_SPREAD, PRIOR_PLANS = 0.1, 4


@dataclass(frozen=True)
class Scale:
    """Measured KL is `value` × the predicted one, give or take the share `error` (one standard error of a single plan's)."""

    value: float = 1.0
    error: float = 0.0
    plans: int = 0  # that it was measured on


@dataclass(frozen=True)
class Measured:
    """A plan (op → format), its KL as predicted at first, and as measured, with its standard error over blocks of text:
    None of one block."""

    formats: dict[str, str]
    predicted: float
    kl: float
    error: float | None

    def at_most(self, robust: float | None) -> float:
        """What is held against a bound: the KL, or with `robust` what it is below at that probability.

        Raises MpqError for `robust` where the standard error is not known.
        """
        if robust is None:
            return self.kl
        if self.error is None:
            raise MpqError(
                "bound.robust needs the spread of the KL over blocks of text, and plans are measured on one block: "
                "set evaluation.samples to 2 or more."
            )
        return self.kl + NormalDist().inv_cdf(robust) * self.error


def fitted(plans: Sequence[Measured]) -> Scale:
    """The scale that measured plans give; 1 ± PRIOR_SPREAD where none has a KL above zero.

    `error` is that of the next plan's: the spread of the logarithms about it (with the prior's weight, as of an inverse-gamma
    prior) and the scale's own error, s² (1 + 1/n).
    """
    logs = [math.log(p.kl / p.predicted) for p in plans if p.predicted > 0 and p.kl > 0]
    n = len(logs)
    if not n:
        return Scale(1.0, PRIOR_SPREAD)
    middle = median(logs)
    squares = PRIOR_PLANS * PRIOR_SPREAD**2 + math.fsum((x - middle) ** 2 for x in logs)
    spread = squares / (PRIOR_PLANS + n - 1)
    return Scale(math.exp(middle), math.sqrt(spread * (1 + 1 / n)), n)


def scaled(gains: pl.DataFrame, scale: Scale) -> pl.DataFrame:
    """The gains table with its KL as measured plans say it is; the scale's error on top of the standard error."""
    if scale == Scale() or "kl" not in gains.columns:
        return gains
    kl = scale.value * pl.col("kl")
    error = scale.value * pl.col("kl_stderr") + scale.error * kl
    return gains.with_columns(kl=kl, kl_stderr=error)


def measured_of(
    formats: Mapping[str, str], predicted: float, of_blocks: Sequence[float]
) -> Measured:
    """A plan with what was measured of it block by block."""
    n = len(of_blocks)
    error = stdev(of_blocks) / math.sqrt(n) if n > 1 else None
    return Measured(dict(formats), predicted, math.fsum(of_blocks) / n, error)


def corrected(scale: Scale, own: Measured, bound: float, robust: float | None) -> Scale:
    """The scale for the next solution: what the plan chosen last says by itself, where it is over its bound or leaves a tenth of
    it. With it a plan that was over is over by prediction as well, and nothing predicted as far up is chosen again."""
    kl = own.at_most(robust)
    if own.predicted <= 0 or 0.9 * bound <= kl <= bound:
        return scale
    choose = max if kl > bound else min
    return replace(scale, value=choose(scale.value, kl / own.predicted))
