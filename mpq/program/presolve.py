"""What can be settled exactly about a multiple-choice knapsack before a solver: dominance, LP bound, fixing, Pareto fronts.

Everything is counted from the cheapest row of each group, in long double: the differences are what decides, and gains and
costs may span twelve orders of magnitude. Every test that drops a row or a state leaves a slack above the rounding error.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Longs = NDArray[np.longdouble]
Mask = NDArray[np.bool_]

EPSILON = float(np.finfo(np.longdouble).eps)
MAX_STORED = 20_000_000  # states of all fronts together that are kept to walk back along
PLANS = 64  # of the best states of a front that are walked back


@dataclass(frozen=True)
class Core:
    """Rows that may still be chosen, sorted by group, then cost; `row` numbers them in the caller's arrays."""

    row: Ints
    group: Ints  # 0 … n_groups-1, ascending
    gain: Longs  # above the group's cheapest row
    cost: Longs  # above the group's cheapest row
    # of the sum of those costs; one rounding of the budget too wide, never too narrow
    capacity: np.longdouble
    slack: np.longdouble  # of the sum of those gains: differences below it are rounding

    @property
    def starts(self) -> Ints:
        return np.flatnonzero(np.r_[True, np.diff(self.group) > 0])

    def only(self, keep: Mask) -> Core:
        kept = {name: getattr(self, name)[keep] for name in ("row", "group", "gain", "cost")}
        return replace(self, **kept)


def total(values: Floats, rows: Ints) -> float:
    """The sum of those rows' values, rounded once."""
    return math.fsum(values[rows].tolist())


def undominated(group: Ints, gain: Floats, cost: Floats, budget: float) -> Core:
    """The rows of each group (numbered 0 … n-1) that no row of at most its cost and at least its gain stands in for.

    Exact: it compares float64 values and adds nothing. Rows that do not fit beside the others' cheapest rows go as well.
    """
    order = np.lexsort((-gain, cost, group))
    rank = np.unique(gain, return_inverse=True)[1].astype(np.int64).ravel()
    # running maxima of the gain start anew with each group
    key = (group * (len(gain) + 1) + rank)[order]
    keep = np.r_[True, key[1:] > np.maximum.accumulate(key)[:-1]]
    row = order[keep].astype(np.int64)
    group = group[row]
    first = np.r_[True, np.diff(group) > 0]
    base = np.flatnonzero(first)[group]
    long_gain, long_cost = gain[row].astype(np.longdouble), cost[row].astype(np.longdouble)
    gains, costs = long_gain - long_gain[base], long_cost - long_cost[base]
    least = long_cost[first]
    rounding = np.longdouble(2.0**-52) * budget + 4 * len(least) * EPSILON * np.abs(least).sum()
    capacity = np.longdouble(budget) - least.sum() + rounding
    fits = costs <= capacity
    fits[first] = True
    row, group, gains, costs = row[fits], group[fits], gains[fits], costs[fits]
    largest = np.maximum.reduceat(gains, np.flatnonzero(np.r_[True, np.diff(group) > 0]))
    slack = 16 * (len(least) + 16) * EPSILON * largest.sum()
    return Core(row, group, gains, costs, capacity, np.longdouble(slack))


def hull(core: Core) -> tuple[Ints, Longs, Longs, Longs]:
    """Steps along the concave hulls, best efficiency first: the row each leads to, its gain, its cost, its efficiency."""
    at = np.arange(len(core.row))
    while True:
        group, gain, cost = core.group[at], core.gain[at], core.cost[at]
        same = group[1:] == group[:-1]
        up, across = np.diff(gain), np.diff(cost)
        # a point under the segment between its neighbours is no vertex, whichever others go at the same time
        under = same[:-1] & same[1:] & (up[:-1] * across[1:] <= up[1:] * across[:-1])
        if not under.any():
            break
        at = at[~np.r_[False, under, False]]
    to, up, across = at[1:][same], up[same], across[same]
    efficiency = up / across
    order = np.argsort(-efficiency, kind="stable")
    return to[order], up[order], across[order], efficiency[order]


def relax(core: Core) -> tuple[np.longdouble, np.longdouble, Ints]:
    """The LP relaxation: its multiplier λ, an upper bound of the gain (valid whatever λ), and a plan (places in the core)."""
    to, _, across, efficiency = hull(core)
    spent = np.cumsum(across)
    taken = int(np.searchsorted(spent, core.capacity, side="right"))
    multiplier = efficiency[taken] if taken < len(to) else np.longdouble(0)
    plan = core.starts.copy()
    np.maximum.at(plan, core.group[to[:taken]], to[:taken])  # places grow along a hull
    reduced = np.maximum.reduceat(core.gain - multiplier * core.cost, core.starts)
    return multiplier, reduced.sum() + multiplier * core.capacity, _fill(core, plan)


def _fill(core: Core, plan: Ints) -> Ints:
    """The plan with what is left of the capacity given to the row that gains most, again and again."""
    for _ in range(64):
        left = core.capacity - core.cost[plan].sum()
        now = plan[core.group]
        more = np.where(core.cost - core.cost[now] <= left, core.gain - core.gain[now], 0)
        best = int(np.argmax(more))
        if more[best] <= 0:
            break
        plan[core.group[best]] = best
    return plan


def fix(
    core: Core, multiplier: np.longdouble, ceiling: np.longdouble, best: Ints
) -> tuple[Core, Ints]:
    """The core without the rows of no plan that gains as much as the plan `best` (row numbers), and `best`'s places in it."""
    plan = np.flatnonzero(np.isin(core.row, best))
    reduced = core.gain - multiplier * core.cost
    loss = np.maximum.reduceat(reduced, core.starts)[core.group] - reduced
    keep = ceiling - loss >= core.gain[plan].sum() - core.slack
    keep[plan] = True
    return core.only(keep), (np.cumsum(keep) - 1)[plan]


def opened(core: Core) -> tuple[Core, Ints]:
    """The program of the groups in which more than one row is left, counted from their cheapest rows left, and the places
    of its rows in `core`: the smallest, and best scaled, that a solver can be given."""
    at = np.flatnonzero(np.bincount(core.group)[core.group] > 1)
    group = np.unique(core.group[at], return_inverse=True)[1].astype(np.int64).ravel()
    first = core.starts[core.group[at]]
    gain, cost = core.gain[at] - core.gain[first], core.cost[at] - core.cost[first]
    capacity = core.capacity - core.cost[core.starts].sum()
    return Core(core.row[at], group, gain, cost, capacity, core.slack), at


def front(
    core: Core, incumbent: np.longdouble, most: int, deadline: float
) -> tuple[list[Ints], bool]:
    """Plans (places in the core) by merging groups into one Pareto front, best gain first, and whether that was exact.

    States that the LP relaxation of the groups ahead cannot lift to the incumbent are dropped; of more than `most`, those
    with the highest bound stay, and the front is exact no more. Past `deadline` (time.perf_counter) it gives no plan.
    """
    ends = np.r_[core.starts, len(core.row)]
    # coarse groups first: fine ones fill what is left; groups of one row settle themselves
    order = np.argsort(-np.maximum.reduceat(core.cost, core.starts), kind="stable")
    several = np.diff(ends)[order] > 1
    settled, undecided = order[~several], order[several]
    turn = np.zeros(len(order), np.int64)
    turn[undecided] = np.arange(len(undecided))
    to, up, across, efficiency = hull(core)
    when = turn[core.group[to]]
    zero = np.zeros(1, np.longdouble)
    cost, gain = core.cost[ends[settled]].sum() + zero, core.gain[ends[settled]].sum() + zero
    # where the groups ahead start from: their cheapest rows
    rest_cost = np.r_[np.cumsum(core.cost[ends[undecided]][::-1])[::-1], zero]
    rest_gain = np.r_[np.cumsum(core.gain[ends[undecided]][::-1])[::-1], zero]
    layers: list[tuple[Ints, Ints]] = []
    exact, stored = True, 0
    for i, g in enumerate(undecided):
        if time.perf_counter() > deadline or stored > MAX_STORED:
            return [], False
        rows = np.arange(ends[g], ends[g + 1])
        costs = (cost[:, None] + core.cost[rows]).ravel()
        gains = (gain[:, None] + core.gain[rows]).ravel()
        ahead = when > i
        steps, lifts = np.r_[zero, np.cumsum(across[ahead])], np.r_[zero, np.cumsum(up[ahead])]
        rates = np.r_[efficiency[ahead], zero]
        left = core.capacity - costs - rest_cost[i + 1]
        place = np.maximum(np.searchsorted(steps, left, side="right") - 1, 0)
        bound = gains + rest_gain[i + 1] + lifts[place] + rates[place] * (left - steps[place])
        alive = np.flatnonzero((left >= 0) & (bound >= incumbent - core.slack))
        if not len(alive):
            return [], exact
        alive = alive[np.lexsort((-gains[alive], costs[alive]))]
        alive = alive[np.r_[True, gains[alive][1:] > np.maximum.accumulate(gains[alive])[:-1]]]
        if len(alive) > most:
            exact = False
            alive = alive[np.sort(np.argpartition(-bound[alive], most)[:most])]
        layers.append((alive // len(rows), rows[alive % len(rows)]))
        cost, gain, stored = costs[alive], gains[alive], stored + len(alive)
    plans = []
    for state in np.argsort(-gain, kind="stable")[:PLANS]:
        plan, at = core.starts.copy(), int(state)
        for g, (parent, row) in zip(undecided[::-1], layers[::-1], strict=True):
            plan[g], at = row[at], int(parent[at])
        plans.append(plan)
    return plans, exact
