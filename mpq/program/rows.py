"""The multiple-choice knapsack under several linear bounds at once: loss, size, time, shares.

One bound that leaves a choice is the knapsack of solver.py, solved exactly. With more, a solver is
asked, every row over what its bound leaves above the cheapest plan; its answer counts only once each
row, summed exactly in float64, keeps its bound. Where nothing does, the rows that clash are named,
and by how much they are missed at least.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpq.errors import MpqError
from mpq.program.backends import ask, least_violation
from mpq.program.presolve import Floats, Ints, total
from mpq.program.solver import NoPlan, Solution, SolverName, solve

ROUNDING = 1e-12  # of the sum of a row's magnitudes: what float64 makes of its terms


@dataclass(frozen=True)
class Row:
    """A linear bound: Σ `values` of the chosen rows ≤ `limit`.

    People are told value / `per` in `unit`; a negative `per` turns an upper bound into a lower one.
    `slack` is what a sum may exceed the limit by, for rows whose terms are rounded themselves.
    """

    name: str
    values: Floats
    limit: float
    unit: str = ""
    per: float = 1.0
    slack: float = 0.0

    @property
    def bound(self) -> str:
        """`effective_bits ≤ 5`."""
        sign = "≥" if self.per < 0 else "≤"
        return f"{self.name} {sign} {self.said(self.limit)}"

    def said(self, value: float) -> str:
        """A value of the row as people read it."""
        return f"{value / self.per:.6g} {self.unit}".rstrip()

    def over(self, plan: Ints) -> float:
        """By how much a plan exceeds the limit; at most 0 where it keeps it."""
        return total(self.values, plan) - self.limit - self.slack


def solve_within(
    group: Ints,
    gain: Floats,
    rows: Sequence[Row],
    *,
    solver: SolverName = "auto",
    time_limit_s: float = 60.0,
) -> Solution:
    """Choose exactly one row of each group so that Σ gain is largest and every one of `rows` holds.

    `group` and `gain` are of shape (rows,), as in solver.solve, which does it where one bound alone
    matters. `cost` of the solution is the first row's. Raises MpqError for values that are not
    finite, NoPlan where no plan keeps all bounds, with those that clash and by how much.
    """
    start = time.perf_counter()
    number = np.unique(group, return_inverse=True)[1].astype(np.int64).ravel()
    for row in rows:
        if not (np.isfinite(row.values).all() and math.isfinite(row.limit)):
            raise MpqError(f"{row.name} has a value or a bound that is no finite number.")
    if len(rows) == 1 and rows[0].limit > 0 and not rows[0].slack and rows[0].values.min() >= 0:
        try:
            return solve(group, gain, rows[0].values, rows[0].limit, solver=solver)
        except NoPlan:
            raise clash(number, rows) from None
    program = Linear(number, gain, rows)
    if not program.possible:
        raise clash(number, rows)
    if len(program.live) <= 1:
        try:
            found = _settled(program, solver, time_limit_s)
        except NoPlan:  # what the other rows leave is over this one
            raise clash(number, rows) from None
        if not any(row.over(np.array(found.chosen)) > 0 for row in rows):
            return replace(found, seconds=time.perf_counter() - start)
    used, answer, notes = ask(solver, program, time_limit_s)
    if answer.plan is None:
        if answer.finished:
            raise clash(number, rows)
        raise NoPlan(f"{used} found no plan within the bounds in {time_limit_s:g} s: loosen one.")
    best = total(gain, answer.plan)
    bound = max(answer.bound, best)
    return Solution(
        tuple(int(r) for r in answer.plan),
        best,
        total(rows[0].values, answer.plan),
        bound,
        "optimal" if answer.finished else "time_limit",
        used,
        time.perf_counter() - start,
        "; ".join(notes),
    )


class Linear:
    """The choices that fit by themselves, as a solver sees them: rows counted from their cheapest choices, over what is left."""

    def __init__(self, group: Ints, gain: Floats, rows: Sequence[Row]) -> None:
        self.limits, self.whole = rows, gain
        keep = np.ones(len(group), bool)
        groups = int(group.max()) + 1
        above, left = [], []
        for row in rows:
            least = _least(row.values, group)
            above.append(row.values - least[group])
            left.append(row.limit + row.slack - math.fsum(least.tolist()))
        self.possible = True
        for row, over, room in zip(rows, above, left, strict=True):
            self.possible &= bool(room >= -ROUNDING * np.abs(row.values).max())
            keep &= over <= room + ROUNDING * over.max()
        self.possible &= len(np.unique(group[keep])) == groups
        order = np.flatnonzero(keep)
        self.row = order[np.argsort(group[order], kind="stable")]
        self.group, self.groups, self.rows = group[self.row], groups, len(self.row)
        most = [_most(over[self.row], self.group) for over in above]
        # a row that no choice can break is none
        self.live = [i for i, (top, room) in enumerate(zip(most, left, strict=True)) if top > room]
        self.above = [above[i][self.row] for i in self.live]
        self.left = [left[i] for i in self.live]
        pairs = zip(self.above, self.left, strict=True)
        costs = [over / room if room > 0 else over for over, room in pairs]
        self.costs = np.array(costs).reshape(len(self.live), self.rows)
        worst = _least(gain, group)
        lifted = gain[self.row] - worst[self.group]
        self.scale = float(lifted.max()) if self.rows and lifted.max() > 0 else 1.0
        self.gain, self.offset = lifted / self.scale, math.fsum(worst.tolist())

    def read(self, values: Floats) -> tuple[Ints, Ints]:
        """Which of its rows a solver chose, and their numbers in the caller's arrays."""
        starts = np.flatnonzero(np.diff(self.group, prepend=-1))
        chosen = np.lexsort((-values, self.group))[starts].astype(np.int64)
        return chosen, self.row[chosen]

    def fits(self, plan: Ints) -> bool:
        """Whether each bound holds, summed exactly."""
        return all(row.over(plan) <= 0 for row in self.limits)

    def bound(self, objective: float) -> float:
        """In the caller's gains."""
        return objective * self.scale + self.offset if math.isfinite(objective) else math.inf


def _least(values: Floats, group: Ints) -> Floats:
    """Each group's smallest value, (groups,)."""
    least = np.full(int(group.max()) + 1, np.inf)
    np.minimum.at(least, group, values)
    return least


def _most(values: Floats, group: Ints) -> float:
    """The sum of the groups' largest values, none of which is below zero."""
    most = np.zeros(int(group.max()) + 1 if len(group) else 0)
    np.maximum.at(most, group, values)
    return math.fsum(most.tolist())


def _settled(program: Linear, solver: SolverName, time_limit_s: float) -> Solution:
    """The exact answer where at most one bound matters."""
    gain, none = program.whole[program.row], np.zeros(program.rows)
    cost, room = (program.above[0], program.left[0]) if program.live else (none, 1.0)
    if room <= 0:  # nothing but the cheapest fits, and Linear kept nothing else
        cost, room = none, 1.0
    # wide by rounding; the caller looks again
    room += ROUNDING * (float(np.abs(cost).max()) + room)
    found = solve(program.group, gain, cost, room, solver=solver, time_limit_s=time_limit_s)
    chosen = program.row[list(found.chosen)]
    spent = total(program.limits[0].values, chosen)
    return replace(found, chosen=tuple(int(r) for r in chosen), cost=spent)


def clash(group: Ints, rows: Sequence[Row]) -> NoPlan:
    """The fewest rows that no plan keeps together, and what the plan that misses them least makes of each."""
    clashing = list(rows)
    for row in rows:
        others = [r for r in clashing if r is not row]
        if others and not keeps(group, others):
            clashing = others
    plan = _nearest(group, clashing)
    bounds = " and ".join(row.bound for row in clashing)
    if plan is None:
        return NoPlan(f"No plan keeps {bounds}: loosen one.")
    missed = [row for row in clashing if row.over(plan) > 0] or clashing[:1]
    nearest = ", ".join(
        f"{row.name} {row.said(total(row.values, plan))} "
        f"({row.said(row.over(plan)).removeprefix('-')} too {'little' if row.per < 0 else 'much'})"
        for row in missed
    )
    together = " together" if len(clashing) > 1 else ""
    return NoPlan(
        f"No plan keeps {bounds}{together}: the nearest has {nearest}. Loosen a bound, or allow "
        "more formats."
    )


def keeps(group: Ints, rows: Sequence[Row]) -> bool:
    """Whether some plan keeps all rows, or none was found in time that tells."""
    plan = _nearest(group, rows)
    return plan is None or all(row.over(plan) <= 0 for row in rows)


def _nearest(group: Ints, rows: Sequence[Row], seconds: float = 20.0) -> Ints | None:
    """The plan whose summed excess over the rows' bounds, each over its own range, is smallest."""
    return least_violation(_Elastic(group, rows), seconds)


class _Elastic(Linear):
    """All choices, however far over; each row over its range, moved so that its bound is 1."""

    def __init__(self, group: Ints, rows: Sequence[Row]) -> None:
        self.limits = rows
        self.row = np.argsort(group, kind="stable")
        self.group, self.groups, self.rows = group[self.row], int(group.max()) + 1, len(group)
        self.gain, self.scale, self.offset = np.zeros(self.rows), 1.0, 0.0
        costs = []
        for row in rows:
            least = _least(row.values, group)
            above = (row.values - least[group])[self.row]
            room = row.limit + row.slack - math.fsum(least.tolist())
            span = max(_most(above, self.group), abs(room)) or 1.0
            # Σ above / span ≤ room / span; one group's choices carry what is missing to 1
            costs.append(above / span + (self.group == 0) * (1 - room / span))
        self.costs = np.array(costs)
