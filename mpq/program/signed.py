"""A plan's loss MSE with the signs that rounding has, in place of a sum over operands.

Rounding a weight is one fixed change, so its first-order effects on a sample, a_il, add over ops
with their signs, and so does the drift D = Σ_l b_l, the KL, by which the mean loss rises. Only what
activations' rounding does is fresh for each sample:

    MSE = (1/N) Σ_i (Σ_l a_il + D)² + Σ_l d_l, d of the operands other than weights,

all of the rounding that happens (noise model `actual`). Over plans it is a convex quadratic, not a
sum over ops.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl

from mpq.errors import MpqError
from mpq.program.costs import Losses, by_op
from mpq.program.presolve import Floats, Ints
from mpq.timing.design import members

log = logging.getLogger("mpq")
Op = tuple[str, str]  # its name and format


class Terms(NamedTuple):
    """What choices add to the loss MSE, each a row: `effects` (rows, samples) and `drift`
    (rows,) nats, `activations` (rows,) nats² with their standard error, NaN where that is not
    known."""

    effects: Floats
    drift: Floats
    activations: Floats
    errors: Floats

    def moved(self, plan: Ints) -> Floats:
        """By how much (nats) the loss of each sample moves under the rows of a plan, each sum
        rounded once."""
        drift = math.fsum(self.drift[plan].tolist())
        return np.array([math.fsum(column) + drift for column in self.effects[plan].T.tolist()])

    def mse(self, plan: Ints) -> float:
        """The loss MSE (nats²) of the rows of a plan."""
        moved = self.moved(plan)
        squares = math.fsum(np.square(moved).tolist()) / len(moved)
        return squares + math.fsum(self.activations[plan].tolist())

    def error(self, plan: Ints) -> float | None:
        """The standard error of `mse` over samples; None of one sample, and where the
        activations' is not known."""
        squares, of_activations = np.square(self.moved(plan)), float(self.errors[plan].sum())
        if len(squares) < 2 or math.isnan(of_activations):
            return None
        return float(squares.std(ddof=1)) / math.sqrt(len(squares)) + of_activations


@dataclass(frozen=True)
class SignedLoss:
    """What each op in each format adds: effects on `samples` samples, drift, activations' loss
    MSE and its standard error."""

    base: str
    samples: int
    effects: Mapping[Op, Floats]
    drift: Losses
    activations: Losses
    errors: Losses
    weighted: frozenset[Op]  # those whose weight is rounded, so that they have effects

    def terms(self, choices: Sequence[Mapping[str, str]]) -> Terms:
        """The terms of choices, op → format each. Raises MpqError where something of an op was
        not measured."""
        effects = np.zeros((len(choices), self.samples))
        others = np.zeros((3, len(choices)))
        for at, formats in enumerate(choices):
            lowered = [of for of in formats.items() if of[1] != self.base]
            for of in lowered:
                if of in self.effects:
                    effects[at] += self.effects[of]
                elif of in self.weighted:
                    raise _unknown("effects", of)
            for row, column in enumerate((self.drift, self.activations, self.errors)):
                found = [column.get(of, math.nan) for of in lowered]
                if row < 2 and (unknown := [of for of in lowered if of not in column]):
                    raise _unknown("sensitivity", unknown[0])
                others[row, at] = math.fsum(found)
        return Terms(effects, *others)

    def of(self, formats: Mapping[str, str]) -> float:
        """The loss MSE (nats²) of a plan, op → format."""
        return self.terms([formats]).mse(np.zeros(1, np.int64))


def choices_of(groups: pl.DataFrame, gains: pl.DataFrame) -> list[dict[str, str]]:
    """What each row of a gains table chooses, op → format."""
    of = members(groups, gains)
    rows = gains.select("group", "configuration").iter_rows()
    return [dict(zip(of[group], formats, strict=True)) for group, formats in rows]


def signed_loss(sensitivity: pl.DataFrame, effects: pl.DataFrame, base: str) -> SignedLoss:
    """From the tables of one measurement. Raises MpqError for effects of other samples than the sensitivities are of."""
    actual = sensitivity.filter(pl.col("noise_model") == "actual")
    _check_samples(effects, max(actual["n_samples"], default=0))
    activations = actual.with_columns(
        pl.when(pl.col("operand") == "weight").then(0.0).otherwise(pl.col(c)).alias(c)
        for c in ("loss_mse", "loss_mse_stderr")
    )
    samples = 1 + int(effects.select(pl.col("sample").max()).item() or 0)
    of_each: dict[Op, Floats] = {}
    for (op, name), of in effects.group_by("op", "format", maintain_order=True):
        # samples that did not run through the op have no row
        of_each[str(op), str(name)] = values = np.zeros(samples)
        values[of["sample"].to_numpy()] = of["effect"].to_numpy()
    weights = actual.filter(pl.col("operand") == "weight").select("op", "format")
    return SignedLoss(
        base,
        samples,
        of_each,
        by_op(actual, "kl"),
        by_op(activations, "loss_mse"),
        by_op(activations, "loss_mse_stderr"),
        frozenset(weights.iter_rows()),
    )


def _check_samples(effects: pl.DataFrame, samples: int) -> None:
    """Raise MpqError where a row is of no sample, or of one that the measurement does not have, or comes twice."""
    at = effects["sample"]
    if len(at) and (at.null_count() or (at.min(), at.max()) != (0, samples - 1)):
        raise MpqError(
            f"The effects table is not of the {samples} samples of the sensitivity table: give both of one `mpq sensitivity`."
        )
    if effects.select("op", "format", "sample").is_duplicated().any():
        raise MpqError(
            "The effects table has a sample of an op twice: give the table of one measurement."
        )


def warn_few(signed: SignedLoss, decisions: int) -> None:
    """Say so where a bound on this loss MSE rests on fewer samples than a plan takes decisions."""
    if signed.samples < decisions:
        log.warning(
            "τ bounds the loss MSE with signs of %d calibration samples for %d decisions: effects that cancel on so few need "
            "not cancel on other text (docs/log.md), so calibrate with more samples, or bound the sum, without signs.",
            signed.samples,
            decisions,
        )


def _unknown(table: str, of: Op) -> MpqError:
    return MpqError(
        f"The {table} table has nothing of {of[0]} in {of[1]}: measure sensitivity again, with that format."
    )
