"""How much calibration is enough: how far the choice, and what it costs, hang on the samples that were drawn.

A gains table has the standard error of each cost over n samples. That of N samples is √(n/N) times as large, so other
calibrations of N samples can be drawn without measuring any: normal, the cost of a group's configurations moving together, as
they do where one sample is hard for an op in every format. The program is solved for each. Two things are told of N samples:
how many of the ops that one such calibration lowers, or another, both lower to the same format; and how far the chosen
plan's cost is known.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import polars as pl

from mpq.program.certainty import ERRORS, HALF
from mpq.program.solver import NoPlan, solve

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the samples that there are
DRAWS = 8
# what is enough: of ops lowered alike, and of the chosen plan's cost as half its 95 % interval
ALIKE, KNOWN = 0.9, 0.1


@dataclass(frozen=True)
class Stability:
    """What calibrations of `samples` samples would say: `alike`, the mean Jaccard index of what two of them lower, and `known`,
    half the 95 % interval of the chosen plan's cost as a share of it."""

    samples: int
    alike: float
    known: float

    @property
    def enough(self) -> bool:
        return self.alike >= ALIKE and self.known <= KNOWN


def stability(
    gains: pl.DataFrame,
    column: str,
    bound: float,
    samples: int,
    base: str,
    factors: Sequence[float] = FACTORS,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Stability]:
    """The curve over numbers of samples, for the program of one gains table under one bound on `column` (kl or loss_mse).

    `samples` is how many the table's standard errors are of. Empty where they are not known, and where no plan lowers
    anything or keeps the bound.
    """
    error = ERRORS[column]
    if error not in gains.columns or gains[error].null_count() or gains[column].null_count():
        return []
    group, gain, cost, sigma = (gains[c].to_numpy() for c in ("group", "gain", column, error))
    try:
        chosen = list(solve(group, gain, cost, bound).chosen)
    except NoPlan:
        return []
    total = math.fsum(cost[chosen])
    if total <= 0:
        return []
    configurations = gains["configuration"].to_list()
    draw, number = np.random.default_rng(seed), np.unique(group, return_inverse=True)[1]
    found = []
    for factor in factors:
        of_draws, error_of = [], sigma / math.sqrt(factor)
        for _ in range(draws):
            drawn = cost + draw.standard_normal(number.max() + 1)[number] * error_of
            try:
                rows = solve(group, gain, np.maximum(0.0, drawn), bound).chosen
            except NoPlan:  # all of it looks too dear to this one: nothing is lowered
                rows = ()
            taken = ((r, place, f) for r in rows for place, f in enumerate(configurations[r]))
            of_draws.append({(int(group[r]), place, f) for r, place, f in taken if f != base})
        alike = fmean(_jaccard(a, b) for a, b in itertools.combinations(of_draws, 2))
        known = HALF * math.fsum(error_of[chosen]) / total
        found.append(Stability(max(1, round(factor * samples)), alike, known))
    return found


def _jaccard(one: set[tuple[int, int, str]], other: set[tuple[int, int, str]]) -> float:
    return len(one & other) / len(one | other) if one | other else 1.0


def advised(curve: Sequence[Stability]) -> int | None:
    """The fewest samples of a curve that are enough; None where none of them are."""
    return next((at.samples for at in curve if at.enough), None)
