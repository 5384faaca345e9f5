"""What an activation's errors add by having signs in common, and when that is counted.

A token's activations u cost Σ (∂g/∂u_n e_n)², if their errors e cancel as they would with signs drawn by chance. Where they
have signs in common, (Σ ∂g/∂u_n e_n)² is what they cost, with all that belongs to the token summed before it is squared: most
of GELU's outputs and of attention's P lie below half an integer's step and go to zero, and the KL of INT8 came out up to 2.6
times too small after a GELU, and 28 times of P at 2048 tokens (docs/log.md). Tokens are taken to be independent: the labels
of different ones are.

The second sum scatters more, as a square of a sum does. So it is taken for an operand and format where it differs from the first
by more than `SURE` standard errors, which the tokens' differences give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from mpq.kernels.errors import MAGNITUDES

SURE = 3.0


@dataclass(frozen=True)
class Estimates:
    """Means over samples: of the magnitudes and then of each format's errors, and their standard errors; of each format, what
    signs in common add, counted or not, and its standard error. None where it is not known."""

    values: list[float]
    errors: list[float] | None
    shared: list[float] | None = None
    shared_errors: list[float] | None = None

    def columns(self, column: str, i: int) -> dict[str, object]:
        """The table's `…_shared` columns of format number i; of -1, base, there are none."""
        if self.shared is None or self.shared_errors is None or i < 0:
            return {}
        names = f"{column}_shared", f"{column}_shared_stderr"
        return dict(zip(names, (self.shared[i], self.shared_errors[i]), strict=True))


def estimated(
    sums: Tensor | None, shared: Tensor | None, n: int, factor: float = 1.0
) -> Estimates | None:
    """`factor` × the means over n samples of a tally's sums (taps.Tally)."""
    if sums is None:
        return None
    values, squares = sums.clone() / n
    added: dict[str, list[float]] = {}
    if shared is not None:
        whole, of_squares, spread = shared / n
        more, error = whole - values[MAGNITUDES:], (spread / n).sqrt()
        counts = more.abs() > SURE * error
        values[MAGNITUDES:] = torch.where(counts, whole, values[MAGNITUDES:])
        squares[MAGNITUDES:] = torch.where(counts, of_squares, squares[MAGNITUDES:])
        # of a format that overflows nothing is known
        known = {"shared": more, "shared_errors": error}
        added = {k: (factor * v).nan_to_num(0.0, 0.0, 0.0).tolist() for k, v in known.items()}
    values = values.nan_to_num(nan=math.inf)  # a value that overflows the format, times no gradient
    errors = None
    if n > 1:
        spread = (squares - values.square()).clamp(min=0)
        errors = (factor * (spread / (n - 1)).sqrt().nan_to_num(nan=math.inf)).tolist()
    return Estimates((factor * values).tolist(), errors, **added)


def merged(column: str) -> list[pl.Expr]:
    """Of rows of shards, the column's mean, standard error, and what signs in common add, with its own: whether that counts is
    decided anew, of all samples."""
    n = pl.col("n_samples")
    shared, error = (pl.col(f"{column}_shared{end}").fill_null(0.0) for end in ("", "_stderr"))
    apart = pl.col(column) - _counted(shared, error)
    more = (shared * n).sum() / n.sum()
    of_more = (error * n).pow(2).sum().sqrt() / n.sum()
    whole = (apart * n).sum() / n.sum() + _counted(more, of_more)
    known = pl.col(column).null_count() == 0
    has = pl.col(f"{column}_shared").null_count() == 0
    return [
        pl.when(known).then(whole).alias(column),
        _stderr(column, f"{column}_stderr"),
        pl.when(has).then(more).alias(f"{column}_shared"),
        pl.when(has).then(of_more).alias(f"{column}_shared_stderr"),
    ]


def _counted(shared: pl.Expr, error: pl.Expr) -> pl.Expr:
    return pl.when(shared.abs() > SURE * error).then(shared).otherwise(0.0)


def mean(column: str) -> pl.Expr:
    """The mean of shards' means; null where a shard has none."""
    n, value = pl.col("n_samples"), pl.col(column)
    return pl.when(value.null_count() == 0).then((value * n).sum() / n.sum()).alias(column)


def _stderr(of: str, error: str) -> pl.Expr:
    """The standard error of the mean of all shards' samples, from each shard's; null of one sample."""
    n, value = pl.col("n_samples"), pl.col(of)
    of_all = (value * n).sum() / n.sum()
    within = (pl.col(error) ** 2 * n * (n - 1)).fill_null(0.0)  # a shard of one has none
    total = (within + n * (value - of_all) ** 2).sum()
    known = (value.null_count() == 0) & (n.sum() > 1)
    return pl.when(known).then((total / (n.sum() * (n.sum() - 1))).sqrt()).alias(error)
