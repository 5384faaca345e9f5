"""What can be proved about a multiple-choice knapsack before any solver runs, in float64.

Costs are divided by the budget, so the bound is 1; gains by their largest magnitude. Three steps, each exact:

1. A row that another row of its group beats in both cost and gain is dropped.
2. The linear relaxation, solved by taking the increments of each group's concave hull in order of gain per cost, gives
   a multiplier λ, an upper bound Σ_j max_r (g_r − λ c_r) + λ, and, by not taking fractions, a plan.
3. A row whose choice lowers that bound below the plan's gain is in no better plan: it is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SLACK = 1e-12  # of rounding in sums, relative to numbers of size 1


@dataclass(frozen=True)
class Rows:
    """The rows of one group that are left: indices into the table, costs (ascending) and gains (ascending), scaled."""

    index: Ints
    cost: Floats
    gain: Floats

    def keep(self, which: NDArray[np.bool_]) -> Rows:
        """The rows where `which` holds."""
        return Rows(self.index[which], self.cost[which], self.gain[which])


def undominated(group: Ints, gain: Floats, cost: Floats) -> list[Rows]:
    """The rows of each group that no other row of it beats, groups in ascending order."""
    order = np.lexsort((-gain, cost, group))
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) != 0])
    kept = []
    for part in np.split(order, starts[1:]):
        best = np.maximum.accumulate(gain[part])
        better = np.r_[True, gain[part][1:] > best[:-1]]
        kept.append(Rows(part[better], cost[part][better], gain[part][better]))
    return kept


def relax(groups: list[Rows]) -> tuple[float, list[int]]:
    """λ of the linear relaxation, and a plan (a row's place in each group) that keeps the budget.

    The cheapest rows are affordable: the caller has checked that.
    """
    steps = [(efficiency, j, at) for j, rows in enumerate(groups) for at, efficiency in _hull(rows)]
    steps.sort(key=lambda s: -s[0])
    chosen = [0] * len(groups)
    spent, multiplier, open_to = sum(float(r.cost[0]) for r in groups), 0.0, [True] * len(groups)
    for efficiency, j, at in steps:
        more = float(groups[j].cost[at] - groups[j].cost[chosen[j]])
        if not open_to[j]:
            continue
        if spent + more <= 1.0:
            chosen[j], spent = at, spent + more
        else:
            multiplier, open_to[j] = max(multiplier, efficiency), False
    for j, rows in enumerate(groups):  # what is left may still buy a better row here or there
        room = float(rows.cost[chosen[j]]) + 1.0 - spent
        at = int(np.searchsorted(rows.cost, room * (1 - SLACK), side="right")) - 1
        if at > chosen[j]:
            spent += float(rows.cost[at] - rows.cost[chosen[j]])
            chosen[j] = at
    return multiplier, chosen


def _hull(rows: Rows) -> list[tuple[int, float]]:
    """The increments of the upper concave hull from the cheapest row on: (row reached, gain per cost), falling."""
    hull: list[tuple[int, float]] = []
    at = 0
    while at < len(rows.cost) - 1:
        slopes = (rows.gain[at + 1 :] - rows.gain[at]) / (rows.cost[at + 1 :] - rows.cost[at])
        step = len(slopes) - 1 - int(np.argmax(slopes[::-1]))  # the farthest of equals
        hull.append((at + 1 + step, float(slopes[step])))
        at += 1 + step
    return hull


def lagrangian(groups: list[Rows], multiplier: float) -> float:
    """Upper bound on the gain of any plan within the budget, for any multiplier of at least 0."""
    return multiplier + sum(float((r.gain - multiplier * r.cost).max()) for r in groups)


def fix(groups: list[Rows], multiplier: float, incumbent: float) -> list[Rows]:
    """Drop the rows that the bound proves to be in no plan better than `incumbent`; the best of each group stays."""
    bound = lagrangian(groups, multiplier)
    room = bound - incumbent + SLACK * (1.0 + abs(bound) + abs(incumbent))
    kept = []
    for rows in groups:
        reduced = rows.gain - multiplier * rows.cost
        kept.append(rows.keep(reduced >= reduced.max() - room))
    return kept
