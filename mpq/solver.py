"""The integer program of eqs. 5–7, a multiple-choice knapsack on arrays: exactly one row of each group, the largest gain.

Raw loss MSEs are 1e-12 to 1e-4, below every solver's tolerances, and solvers then call plans optimal that are several
times over budget. So the program is scaled, reduced by what can be proved in float64 (presolve.py), solved by Gurobi or
HiGHS at their tightest tolerances, and the answer re-checked in float64. What remains is mostly small enough for an exact
dynamic program as well, which certifies the solver's answer or replaces it; the note says which.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from mpq.errors import MpqError
from mpq.presolve import SLACK, Floats, Ints, Rows, fix, lagrangian, relax, undominated

log = logging.getLogger("mpq")

SolverName = Literal["auto", "highs", "gurobi"]
GUROBI_PIP_VARIABLES = 2000  # what the licence that comes with the wheel serves
STATES = 200_000  # the dynamic program gives up beyond
WORK = 20_000_000  # states made in all, likewise: a second or two


@dataclass(frozen=True)
class Solution:
    """One row of each group. `gain`, `cost` and `bound` are in the units given; `gap` is (bound − gain) / |bound|."""

    chosen: tuple[int, ...]
    gain: float
    cost: float
    bound: float
    gap: float
    status: Literal["optimal", "time_limit"]
    solver: Literal["highs", "gurobi", "presolve"]
    seconds: float
    note: str = ""


def solve(
    group: Ints, gain: Floats, cost: Floats, budget: float, *, solver: SolverName = "auto", time_limit_s: float = 60.0
) -> Solution:
    """Maximise Σ gain under Σ cost ≤ budget with exactly one row of each group; all three arrays are (rows,).

    `auto` is Gurobi where its licence serves what is left after presolve, else HiGHS. Raises MpqError for numbers that
    are not finite, a budget that is not above zero, and one that not even the cheapest rows keep.
    """
    start = time.perf_counter()
    group, gain, cost = np.asarray(group), np.asarray(gain, np.float64), np.asarray(cost, np.float64)
    _check(group, gain, cost, budget)
    scale = float(np.abs(gain).max()) or 1.0
    groups = undominated(group, gain / scale, cost / budget)
    multiplier, plan = relax(groups)
    incumbent = _gain(groups, plan)
    bound = lagrangian(groups, multiplier)
    best = [int(rows.index[at]) for rows, at in zip(groups, plan, strict=True)]
    core = fix(groups, multiplier, incumbent)
    used: Literal["highs", "gurobi", "presolve"] = "presolve"
    status: Literal["optimal", "time_limit"] = "optimal"
    note = ""
    if any(len(rows.index) > 1 for rows in core):
        used, note = _which(solver, sum(len(rows.index) for rows in core if len(rows.index) > 1))
        answer, limit, finished = (_gurobi if used == "gurobi" else _highs)(core, time_limit_s)
        bound, status = min(bound, limit), "optimal" if finished else "time_limit"
        if answer is not None and _keeps(answer, cost, budget):  # a better plan proves more rows useless
            incumbent = max(incumbent, _total(answer, gain) / scale)
        certified = _dynamic_program(fix(core, multiplier, incumbent), multiplier, incumbent)
        candidates = [c for c in (answer, certified) if c is not None]
        for candidate in candidates:
            if _keeps(candidate, cost, budget) and _total(candidate, gain) > _total(best, gain):
                best = candidate
        if answer is None or not _keeps(answer, cost, budget):
            note = _join(note, f"{used} answered outside the budget or not at all; the float64 answer stands")
        elif _total(best, gain) > _total(answer, gain) + 1e-9 * scale:
            note = _join(
                note, f"{used} stopped {(_total(best, gain) - _total(answer, gain)) / scale:.1e} short; the float64 answer stands"
            )
        if certified is not None:
            bound, status = _total(best, gain) / scale, "optimal"
    else:
        bound = _total(best, gain) / scale
    value = _total(best, gain)
    upper = max(value, bound * scale)
    gap = (upper - value) / abs(upper) if upper else 0.0
    return Solution(tuple(best), value, _total(best, cost), upper, gap, status, used, time.perf_counter() - start, note)


def _check(group: Ints, gain: Floats, cost: Floats, budget: float) -> None:
    if not len(group) or not len(group) == len(gain) == len(cost):
        raise MpqError(f"A program needs a group, a gain and a cost for each row: got {len(group)}, {len(gain)} and {len(cost)}.")
    for name, values in (("gain", gain), ("cost", cost)):
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise MpqError(
                f"Row {row} has the {name} {values[row]}: every gain and cost must be finite; measure that configuration again."
            )
    if not (budget > 0 and math.isfinite(budget)):
        raise MpqError(f"The budget must be above zero, got {budget:g}: it is the largest loss MSE that the plan may have.")
    order = np.lexsort((cost, group))
    cheapest = order[np.r_[True, np.diff(group[order]) != 0]]
    least = math.fsum(cost[cheapest])
    if least > budget:
        raise MpqError(
            f"The budget {budget:g} cannot be kept: the cheapest configuration of every group already costs {least:g}; raise it."
        )


def _total(rows: list[int], values: Floats) -> float:
    return math.fsum(values[rows])


def _keeps(rows: list[int], cost: Floats, budget: float) -> bool:
    return _total(rows, cost) <= budget


def _gain(groups: list[Rows], plan: list[int]) -> float:
    return math.fsum(rows.gain[at] for rows, at in zip(groups, plan, strict=True))


def _join(note: str, more: str) -> str:
    return f"{note}; {more}" if note else more


def _which(wanted: SolverName, variables: int) -> tuple[Literal["highs", "gurobi"], str]:
    """The solver to use, and what to say where it is not the one that was asked for."""
    if wanted == "highs":
        return "highs", ""
    missing = _gurobi_missing()
    if not missing and variables > GUROBI_PIP_VARIABLES and _licence_is_limited():
        missing = f"its licence serves {GUROBI_PIP_VARIABLES} variables, the program has {variables}"
    if not missing:
        return "gurobi", ""
    note = f"Gurobi not used ({missing}): solved by HiGHS"
    if wanted == "gurobi":
        log.warning(note)
    return "highs", note


@cache
def _environment() -> Any:
    import gurobipy

    environment = gurobipy.Env(params={"OutputFlag": 0})
    return environment


def _gurobi_missing() -> str:
    """Why Gurobi cannot be used; empty where it can."""
    try:
        _environment()
    except ImportError:
        return "not installed"
    except Exception as error:  # gurobipy's own, for every licence trouble
        return f"no licence: {error}"
    return ""


def _licence_is_limited() -> bool:
    import gurobipy

    try:
        with gurobipy.Model(env=_environment()) as model:
            model.addVars(GUROBI_PIP_VARIABLES + 1)
            model.optimize()
    except gurobipy.GurobiError:
        return True
    return False


def _matrix(core: list[Rows]) -> tuple[Floats, Floats, Ints, float]:
    """The groups with a choice left: their gains, costs and starts, and the room that the others leave."""
    free = [rows for rows in core if len(rows.index) > 1]
    room = 1.0 - math.fsum(float(rows.cost[0]) for rows in core if len(rows.index) == 1)
    starts = np.cumsum([0, *(len(rows.index) for rows in free)])
    return np.concatenate([r.gain for r in free]), np.concatenate([r.cost for r in free]), starts, room


def _choice(core: list[Rows], values: Floats, starts: Ints) -> list[int]:
    """The row of each group of `core` that a solver's values choose."""
    chosen, at = [], 0
    for rows in core:
        if len(rows.index) == 1:
            chosen.append(int(rows.index[0]))
        else:
            chosen.append(int(rows.index[int(np.argmax(values[starts[at] : starts[at + 1]]))]))
            at += 1
    return chosen


def _highs(core: list[Rows], time_limit_s: float) -> tuple[list[int] | None, float, bool]:
    """HiGHS's answer, its bound on the scaled gain, and whether it finished."""
    import highspy

    gain, cost, starts, room = _matrix(core)
    n = len(gain)
    highs = highspy.Highs()
    options = {
        "output_flag": False, "log_to_console": False, "mip_rel_gap": 0.0, "mip_abs_gap": 0.0, "time_limit": time_limit_s,
        "primal_feasibility_tolerance": 1e-10, "mip_feasibility_tolerance": 1e-10, "small_matrix_value": 1e-12,
    }  # fmt: skip
    for name, value in options.items():
        highs.setOptionValue(name, value)
    # the budget's row in units of what is left of it: the tolerances then are fractions of the room
    unit = room if room > 1e-6 else 1.0
    highs.addVars(n, np.zeros(n), np.ones(n))
    highs.changeColsCost(n, np.arange(n, dtype=np.int32), gain)
    highs.changeColsIntegrality(n, np.arange(n, dtype=np.int32), np.full(n, highspy.HighsVarType.kInteger))
    highs.changeObjectiveSense(highspy.ObjSense.kMaximize)
    ones = np.ones(len(starts) - 1)
    highs.addRows(len(ones), ones, ones, n, starts[:-1].astype(np.int32), np.arange(n, dtype=np.int32), np.ones(n))
    highs.addRow(-highspy.kHighsInf, room / unit, n, np.arange(n, dtype=np.int32), cost / unit)
    highs.run()
    status, info = highs.getModelStatus(), highs.getInfo()
    bound = float(info.mip_dual_bound) + math.fsum(float(r.gain[0]) for r in core if len(r.index) == 1)
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None, math.inf, False
    finished = status == highspy.HighsModelStatus.kOptimal
    return _choice(core, np.array(highs.getSolution().col_value), starts), bound, finished


def _gurobi(core: list[Rows], time_limit_s: float) -> tuple[list[int] | None, float, bool]:
    """Gurobi's answer, its bound on the scaled gain, and whether it finished."""
    import gurobipy

    gain, cost, starts, room = _matrix(core)
    with gurobipy.Model(env=_environment()) as model:
        for name, value in {
            "MIPGap": 0.0,
            "MIPGapAbs": 0.0,
            "FeasibilityTol": 1e-9,
            "IntFeasTol": 1e-9,
            "TimeLimit": time_limit_s,
        }.items():
            model.setParam(name, value)
        # variables one by one: the matrix interface would need scipy
        x = list(model.addVars(len(gain), vtype="B", obj=gain.tolist()).values())
        model.ModelSense = -1
        for first, last in itertools.pairwise(starts.tolist()):
            model.addConstr(gurobipy.quicksum(x[first:last]) == 1)
        unit = room if room > 1e-6 else 1.0
        model.addConstr(gurobipy.LinExpr((cost / unit).tolist(), x) <= room / unit)
        model.optimize()
        if not model.SolCount:
            return None, math.inf, False
        bound = float(model.ObjBound) + math.fsum(float(r.gain[0]) for r in core if len(r.index) == 1)
        return _choice(core, np.array([v.X for v in x]), starts), bound, model.Status == gurobipy.GRB.OPTIMAL


def _dynamic_program(core: list[Rows], multiplier: float, incumbent: float) -> list[int] | None:
    """The best plan in float64, by merging groups and keeping (cost, gain) states that no other beats; None beyond STATES.

    A state is dropped where even the Lagrangian bound of the groups to come does not lift it to `incumbent`.
    """
    reduced = [float((r.gain - multiplier * r.cost).max()) for r in core]
    to_come = np.cumsum([0.0, *reversed(reduced)])[::-1]  # Σ of later groups' best reduced gains
    cheapest = np.cumsum([0.0, *(float(r.cost[0]) for r in reversed(core))])[::-1]
    cost, gain, trail = np.zeros(1), np.zeros(1), []
    floor = incumbent - SLACK * 10 * (1.0 + abs(incumbent))
    made = 0
    for j, rows in enumerate(core):
        made += len(cost) * len(rows.cost)
        if made > WORK:
            return None
        every_cost = (cost[:, None] + rows.cost).ravel()
        every_gain = (gain[:, None] + rows.gain).ravel()
        hopeful = every_gain - multiplier * every_cost + multiplier + to_come[j + 1] >= floor
        hopeful &= every_cost + cheapest[j + 1] <= 1.0 + SLACK
        where = np.flatnonzero(hopeful)
        where = where[np.lexsort((-every_gain[where], every_cost[where]))]
        if not len(where):
            return None
        ahead = np.maximum.accumulate(every_gain[where])
        where = where[np.r_[True, every_gain[where][1:] > ahead[:-1]]]
        if len(where) > STATES:
            return None
        cost, gain = every_cost[where], every_gain[where]
        trail.append((where // len(rows.cost), where % len(rows.cost)))
    within = np.flatnonzero(cost <= 1.0)
    at = int(within[-1]) if len(within) else 0
    chosen: list[int] = []
    for rows, (parent, row) in zip(reversed(core), reversed(trail), strict=True):
        chosen.append(int(rows.index[row[at]]))
        at = int(parent[at])
    return chosen[::-1]
