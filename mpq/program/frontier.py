"""The whole frontier of gain against cost from one gains table: Pareto-optimal plans, each with an upper bound of its gain.

Where nothing but the cost bounds the plans, the steps along the groups' concave hulls, best efficiency first, give plans that
maximise Σ gain − λ Σ cost for some λ: no plan that costs as little gains more. They need no solver. Between them, where the
next is farther away than asked for, the program is solved; where further bounds hold, everywhere.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpq.errors import MpqError
from mpq.program.presolve import Floats, Ints, hull, total, undominated
from mpq.program.rows import Row, solve_within
from mpq.program.solver import NoPlan, Solution


@dataclass(frozen=True)
class Step:
    """The change of one group that costs least for what it gains: to a row of the table, with what it adds."""

    row: int
    gain: float
    cost: float


@dataclass(frozen=True)
class Point:
    """One row of each group, none of which costs as little and gains more; `bound` is an upper bound of the gain at this cost."""

    rows: tuple[int, ...]
    gain: float
    cost: float
    bound: float
    step: Step | None  # None where no single change gains more

    @property
    def certified(self) -> bool:
        """Whether no plan of at most this cost gains more, up to rounding."""
        return self.bound - self.gain <= 1e-9 * max(1e-300, abs(self.gain))


def frontier(
    group: Ints,
    gain: Floats,
    cost: Floats,
    points: int = 200,
    further: Sequence[Row] = (),
    time_limit_s: float = 10.0,
) -> list[Point]:
    """At most `points` plans from the cheapest to the one that gains most, in the order of their cost, both ends among them.

    `group`, `gain` and `cost` are of shape (rows,), as in solver.solve; every one of `further` holds in all plans. Plans are
    spread evenly over the gain. Raises MpqError for fewer than two points and values that are not finite, NoPlan where
    nothing keeps `further`.
    """
    if points < 2:
        raise MpqError(f"A frontier has two ends: expected two points or more, got {points}.")
    if not (np.isfinite(gain).all() and np.isfinite(cost).all()):
        raise MpqError("The gains table has a gain or a cost that is no number: measure it again.")
    number = np.unique(group, return_inverse=True)[1].astype(np.int64).ravel()
    found = _ends(number, gain, cost, further) if further else list(_on_hull(number, gain, cost))
    if len(found) > points:
        found = _spread(found, points)
    else:
        found = _filled(found, number, gain, cost, points, further, time_limit_s)
    return [_with_step(point, number, gain, cost, further) for point in _best(found)]


def _on_hull(group: Ints, gain: Floats, cost: Floats) -> Iterator[Point]:
    core = undominated(group, gain, cost, float(np.abs(cost).sum()) + 1.0)
    plan = core.row[core.starts].copy()
    steps, *_ = hull(core)
    for place in itertools.chain([None], steps.tolist()):
        if place is not None:
            plan[core.group[place]] = core.row[place]
        best = total(gain, plan)
        yield Point(tuple(plan.tolist()), best, total(cost, plan), best, None)


def _ends(group: Ints, gain: Floats, cost: Floats, further: Sequence[Row]) -> list[Point]:
    cheapest = solve_within(group, -cost, further)
    limit = total(cost, np.array(cheapest.chosen))
    room = Row("cost", cost, limit + 1e-12 * float(np.abs(cost).max()))
    found = [solve_within(group, gain, rows) for rows in ([room, *further], further)]
    return [_point(solution, cost) for solution in found]


def _point(solution: Solution, cost: Floats) -> Point:
    chosen = solution.chosen
    return Point(chosen, solution.gain, total(cost, np.array(chosen)), solution.bound, None)


def _filled(
    found: list[Point],
    group: Ints,
    gain: Floats,
    cost: Floats,
    points: int,
    further: Sequence[Row],
    time_limit_s: float,
) -> list[Point]:
    """The points, and between the farthest of them what the program finds, until there are as many as asked for."""
    count = itertools.count()  # no two entries of the heap are compared further
    wide: list[tuple[float, int, float, Point, float, Point]] = []

    def look(low: Point, above: float, high: Point, below: float) -> None:
        """Between two points, the cost above `above` and at most `below` has not been looked at."""
        middle = (above + below) / 2
        if high.gain > low.gain and above < middle < below:
            heapq.heappush(wide, (low.gain - high.gain, next(count), above, low, below, high))

    for low, high in itertools.pairwise(found):
        look(low, low.cost, high, high.cost)
    for _ in range(2 * points):
        if not wide or len(found) >= points:
            break
        _, _, above, low, below, high = heapq.heappop(wide)
        middle = (above + below) / 2
        limit = Row("cost", cost, middle)
        try:
            between = _point(
                solve_within(group, gain, [limit, *further], time_limit_s=time_limit_s), cost
            )
        except NoPlan:  # found in no time: what is there is said without it
            continue
        if between.gain > low.gain:
            found.append(between)
            look(low, low.cost, between, between.cost)
            look(between, middle, high, below)
        elif (below - above) > 1e-3 * (high.cost - low.cost):
            look(low, middle, high, below)
    return found


def _spread(found: list[Point], points: int) -> list[Point]:
    """As many points: those are left out, one by one, that leave the smallest gap in the gain."""
    kept = np.arange(len(found))
    gains = np.array([point.gain for point in found])
    while len(kept) > points:
        kept = np.delete(kept, int((gains[kept[2:]] - gains[kept[:-2]]).argmin()) + 1)
    return [found[i] for i in kept]


def _best(found: list[Point]) -> list[Point]:
    """In the order of the cost, without those that a cheaper one stands in for."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda p: (p.cost, -p.gain)):
        if not kept or point.gain > kept[-1].gain:
            kept.append(point)
    return kept


def _with_step(
    point: Point, group: Ints, gain: Floats, cost: Floats, further: Sequence[Row]
) -> Point:
    plan = np.array(point.rows)
    now = plan[np.argsort(group[plan])][group]  # each row's place in the plan
    more, worse = gain - gain[now], cost - cost[now]
    can = (more > 0) & (worse > 0)
    for row in further:
        left = row.limit + row.slack - total(row.values, plan)
        can &= row.values - row.values[now] <= left
    if not can.any():
        return point
    at = int(np.where(can, worse / np.where(can, more, 1.0), np.inf).argmin())
    step = Step(at, float(more[at]), float(worse[at]))
    return Point(point.rows, point.gain, point.cost, point.bound, step)
