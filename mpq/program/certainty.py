"""How sure a prediction is: the probability that a plan breaks its bounds, and costs that keep them at a probability.

A predicted cost is a mean over calibration samples, so its error is close to normal: cost ~ N(c, σ²), with c and σ (its
standard error) summed over the plan's ops. Errors of ops are added, not their squares: samples that are hard for one op are
hard for all, and the sum is never less than the plan's own error. So Φ((bound − c) / σ) is the probability that the bound
holds, and c + z σ ≤ bound keeps it at the probability Φ(z): a linear row of the program, as c ≤ bound is.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist

import polars as pl

from mpq.errors import MpqError

HALF = 1.96  # standard errors in half a 95 % interval
# column of the gains table that may be bounded → the column of its standard error
ERRORS = {"loss_mse": "loss_mse_stderr", "kl": "kl_stderr"}


def risk(
    predicted: Mapping[str, tuple[float | None, float | None]], budgets: Mapping[str, float]
) -> float | None:
    """The probability, 0 to 1, that a plan breaks one of its bounds; None where an error is not known.

    `predicted` is (cost, standard error) by column, `budgets` the bounds. Of several bounds the probabilities add, which
    is never less than the probability of breaking any.
    """
    broken = 0.0
    for column, bound in budgets.items():
        cost, error = predicted[column]
        if cost is None or error is None:
            return None
        broken += 1 - NormalDist(cost, error).cdf(bound) if error > 0 else float(cost > bound)
    return min(1.0, broken)


def held_at(gains: pl.DataFrame, probability: float, columns: Mapping[str, float]) -> pl.DataFrame:
    """The gains table with z standard errors added to the bounded `columns`, Φ(z) = `probability` (0.5 to 1).

    Raises MpqError where a standard error is not known: one calibration sample has none, nor have tables of before.
    """
    z = NormalDist().inv_cdf(probability)
    for column in columns:
        error = ERRORS[column]
        if error not in gains.columns or gains[error].null_count():
            raise MpqError(
                f"bound.robust needs the standard error of {column}, which the gains table lacks: measure sensitivity "
                "again, on two samples or more."
            )
    return gains.with_columns(pl.col(c) + z * pl.col(ERRORS[c]) for c in columns)
