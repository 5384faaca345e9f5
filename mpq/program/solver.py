"""The multiple-choice knapsack of eqs. 5–7, on arrays: exact where that is possible, else HiGHS or Gurobi, re-checked.

Costs are 1e-12 … 1e-4, below what a solver tolerates as rounding: unscaled, HiGHS 1.16 has called a plan of 4.4 times its
budget optimal. So solvers see costs over what the budget leaves and gains over the largest, and none is believed: a plan
counts only once its costs, summed exactly in float64, fit the budget.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpq.errors import MpqError
from mpq.program.backends import SIZE_LIMITED, ask
from mpq.program.presolve import (
    PLANS,
    Core,
    Floats,
    Ints,
    fix,
    front,
    opened,
    relax,
    total,
    undominated,
)

SolverName = Literal["auto", "highs", "gurobi"]
BEAMS = (2_000, 200_000)  # states: a narrow front for a good incumbent first


@dataclass(frozen=True)
class Solution:
    """One row of each group, within the budget. `solver` 'presolve': none was needed; `bound` is an upper bound of the gain,
    `gap` = (bound - gain) / |gain|: of a plan that gains nothing infinite, unless nothing can be gained."""

    chosen: tuple[int, ...]
    gain: float
    cost: float
    bound: float
    gap: float = field(init=False)
    status: Literal["optimal", "time_limit"]
    solver: Literal["highs", "gurobi", "presolve"]
    seconds: float
    note: str = ""

    def __post_init__(self) -> None:
        left = self.bound - self.gain
        gap = left / abs(self.gain) if self.gain else (math.inf if left > 0 else 0.0)
        object.__setattr__(self, "gap", gap)


def solve(
    group: NDArray[np.int64],
    gain: Floats,
    cost: Floats,
    budget: float,
    *,
    solver: SolverName = "auto",
    time_limit_s: float = 60.0,
) -> Solution:
    """Choose exactly one row of each group so that Σ gain is largest under Σ cost ≤ budget (method.md, eqs. 5–7).

    `group`, `gain` and `cost` are of shape (rows,); row r is one configuration of group[r]. Gains are in any one unit
    (seconds, MACs, bytes), costs and budget in another (nats²). `chosen` holds row numbers in ascending order of group.
    'auto' asks a solver only for what presolve leaves open; a solver asked for by name runs wherever more than one row is
    left, and is corrected where float64 knows better. Without a usable Gurobi it is HiGHS, and `note` says so.

    Raises MpqError for arrays that are no program, values or a budget that are not finite, a budget that is not above
    zero, and a budget below the sum of the groups' smallest costs.
    """
    start = time.perf_counter()
    group = np.asarray(group)
    gain, cost = np.asarray(gain, np.float64), np.asarray(cost, np.float64)
    check(group, gain, cost, budget, solver, time_limit_s)
    number = np.unique(group, return_inverse=True)[1].astype(np.int64).ravel()
    core = undominated(number, gain, cost, budget)
    best = core.row[core.starts]  # the cheapest rows at first; always within the budget
    if (least := total(cost, best)) > budget:
        raise no_plan(budget, least)
    base = best_gain = total(gain, best)

    def offer(plan: Ints, of: Core) -> bool:
        nonlocal best, best_gain
        rows = of.row[plan]
        gained, spent = total(gain, rows), total(cost, rows)
        # of two plans that gain the same, the cheaper
        if spent <= budget and (gained, -spent) > (best_gain, -total(cost, best)):
            best, best_gain = rows, gained
        return spent <= budget

    multiplier, ceiling, plan = relax(core)
    offer(plan, core)
    # a solver asked for by name gets more than the fronts leave of the program, which is little or nothing
    named = core if len(core.row) <= SIZE_LIMITED else fix(core, multiplier, ceiling, best)[0]
    exact = False
    for beam in BEAMS:
        core, at = fix(core, multiplier, ceiling, best)
        incumbent = core.gain[at].sum()
        # a bound that the incumbent reaches leaves nothing to find
        rounding = min(float(core.slack), 1e-15 * abs(best_gain))
        exact = len(core.row) == len(at) or ceiling - incumbent <= rounding
        if not exact:
            plans, exact = front(core, incumbent, beam, start + time_limit_s / 2)
            fitting = [offer(plan, core) for plan in plans]
            # the best state may be one rounding over the budget; then the next is the best
            exact = exact and (any(fitting) or len(fitting) < PLANS)
        if exact:
            break
    core = named if solver != "auto" else fix(core, multiplier, ceiling, best)[0]
    used: Literal["highs", "gurobi", "presolve"] = "presolve"
    bound, finished, notes = base + float(ceiling), exact, list[str]()
    if len(core.row) > len(core.starts) and (solver != "auto" or not exact):
        seconds = max(start + time_limit_s - time.perf_counter(), 0.1)
        used, answer, notes = ask(solver, _Program(core, cost, budget), seconds)
        said, what = -math.inf, "found no plan within the budget"
        if answer.plan is not None:
            said = total(gain, core.row[answer.plan])
            what = f"gained {said:.12g}"
            offer(answer.plan, core)
        if not exact:
            bound, finished = min(bound, base + answer.bound), answer.finished
        tolerated = 1e-9 * max(abs(best_gain), float(core.gain.max()))
        if answer.finished and best_gain - said > tolerated:
            notes.append(
                f"{used} {what}; the plan found in float64 gains {best_gain:.12g} and is returned"
            )
    bound = best_gain if exact else max(bound, best_gain)
    return Solution(
        tuple(int(r) for r in best),
        best_gain,
        total(cost, best),
        bound,
        "optimal" if finished else "time_limit",
        used,
        time.perf_counter() - start,
        "; ".join(notes),
    )


class NoPlan(MpqError):
    """Nothing that may be chosen keeps the bounds."""


def no_plan(budget: float, least: float, of: str = "") -> NoPlan:
    """The sentence for a budget `of` something that the cheapest plan, which costs `least`, exceeds."""
    told = f"{budget:.6g} {of}".rstrip()
    return NoPlan(
        f"No plan fits the budget {told}: the cheapest costs {least:.6g}, with the least costly "
        "configuration of every group. Raise the bound, or add a configuration that costs less."
    )


def check(
    group: NDArray[Any], gain: Floats, cost: Floats, budget: float, solver: str, time_limit_s: float
) -> None:
    """Raise MpqError for arrays that are no program, and what is not finite or not above zero."""
    if group.ndim != 1 or not group.shape == gain.shape == cost.shape:
        raise MpqError(
            f"group, gain and cost must be of one length, got the shapes {group.shape}, {gain.shape}, {cost.shape}."
        )
    if not len(group):
        raise MpqError(
            "There is nothing to choose from: expected a row for each configuration of each group, got none."
        )
    for name, values in (("gain", gain), ("cost", cost)):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            r = int(bad[0])
            raise MpqError(
                f"The {name} of row {r} (group {group[r]}) is {values[r]}: expected a finite number, measure it again."
            )
    if not (budget > 0 and math.isfinite(budget)):
        raise MpqError(
            f"The budget must be finite and above zero, got {budget}: it is τ² E[g²], so check τ and the mean square loss."
        )
    if solver not in ("auto", "highs", "gurobi"):
        raise MpqError(f"There is no solver {solver!r}: choose auto, highs or gurobi.")
    if not time_limit_s > 0:
        raise MpqError(f"The time limit must be above zero seconds, got {time_limit_s}.")


class _Program:
    """The open groups of a core as a solver sees them: gains over the largest, costs over the capacity."""

    def __init__(self, core: Core, cost: Floats, budget: float) -> None:
        self.core, self.cost, self.budget = core, cost, budget
        self.open, self.places = opened(core)
        self.group, self.rows = self.open.group, len(self.open.row)
        self.groups = len(self.open.starts)
        largest, capacity = self.open.gain.max(), self.open.capacity
        self.scale = float(largest) if largest > 0 else 1.0
        self.gain = (self.open.gain / self.scale).astype(np.float64)
        self.costs = (self.open.cost / (capacity if capacity > 0 else 1)).astype(np.float64)[None]
        self.offset = float(core.gain[core.starts].sum())

    def read(self, values: Floats) -> tuple[Ints, Ints]:
        """Which of its rows a solver chose (the largest value of each group), and the plan as places in the core."""
        chosen = np.lexsort((-values, self.group))[self.open.starts].astype(np.int64)
        plan = self.core.starts.copy()
        plan[self.core.group[self.places[chosen]]] = self.places[chosen]
        return chosen, plan

    def fits(self, plan: Ints) -> bool:
        return total(self.cost, self.core.row[plan]) <= self.budget

    def bound(self, objective: float) -> float:
        return objective * self.scale + self.offset if math.isfinite(objective) else math.inf
