"""The multiple-choice knapsack of eqs. 5–7, on arrays: exact where that is possible, else HiGHS or Gurobi, re-checked.

Costs are 1e-12 … 1e-4, below what a solver tolerates as rounding: unscaled, HiGHS 1.16 has called a plan of 4.4 times its
budget optimal. So solvers see costs over what the budget leaves and gains over the largest, and none is believed: a plan
counts only once its costs, summed exactly in float64, fit the budget.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpq.errors import MpqError
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

log = logging.getLogger("mpq")

SolverName = Literal["auto", "highs", "gurobi"]
SIZE_LIMITED = 2_000  # variables, and constraints, of Gurobi's licence that comes with pip
BEAMS = (2_000, 200_000)  # states: a narrow front for a good incumbent first
MAX_CUTS = 20  # plans over budget that a solver may return before its answer is dropped


@dataclass(frozen=True)
class Solution:
    """One row of each group, within the budget. `solver` 'presolve': none was needed; `bound` is an upper bound of the
    gain, `gap` = (bound - gain) / |gain|."""

    chosen: tuple[int, ...]
    gain: float
    cost: float
    bound: float
    gap: float
    status: Literal["optimal", "time_limit"]
    solver: Literal["highs", "gurobi", "presolve"]
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class _Answer:
    """What a solver says: a plan (places in the core) or none, its bound above the base, and whether it finished."""

    plan: Ints | None
    bound: float
    finished: bool


class _Unavailable(Exception):
    """Why Gurobi cannot be used, in words for the note."""


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
    group, gain, cost = (
        np.asarray(group),
        np.asarray(gain, np.float64),
        np.asarray(cost, np.float64),
    )
    _check(group, gain, cost, budget, solver, time_limit_s)
    number = np.unique(group, return_inverse=True)[1].astype(np.int64).ravel()
    core = undominated(number, gain, cost, budget)
    best = core.row[core.starts]  # the cheapest rows at first; always within the budget
    if (least := total(cost, best)) > budget:
        raise no_plan(budget, least)
    base = best_gain = total(gain, best)

    def offer(plan: Ints, of: Core) -> bool:
        nonlocal best, best_gain
        rows = of.row[plan]
        merit = (
            total(gain, rows),
            -total(cost, rows),
        )  # of two plans that gain the same, the cheaper
        fits = -merit[1] <= budget
        if fits and merit > (best_gain, -total(cost, best)):
            best, best_gain = rows, merit[0]
        return fits

    multiplier, ceiling, plan = relax(core)
    offer(plan, core)
    # a solver asked for by name gets more than the fronts leave of the program, which is little or nothing
    named = core if len(core.row) <= SIZE_LIMITED else fix(core, multiplier, ceiling, best)[0]
    exact = False
    for beam in BEAMS:
        core, at = fix(core, multiplier, ceiling, best)
        incumbent = core.gain[at].sum()
        # a bound that the incumbent reaches leaves nothing to find
        exact = len(core.row) == len(at) or ceiling - incumbent <= min(
            float(core.slack), 1e-15 * abs(best_gain)
        )
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
        used, answer, notes = _ask(solver, _Program(core, cost, budget), seconds)
        said = -math.inf
        if answer.plan is not None:
            said = total(gain, core.row[answer.plan])
            offer(answer.plan, core)
        if not exact:
            bound, finished = min(bound, base + answer.bound), answer.finished
        if answer.finished and best_gain - said > 1e-9 * max(
            abs(best_gain), float(core.gain.max())
        ):
            what = (
                f"gained {said:.12g}"
                if answer.plan is not None
                else "found no plan within the budget"
            )
            notes.append(
                f"{used} {what}; the plan found in float64 gains {best_gain:.12g} and is returned"
            )
    bound = best_gain if exact else max(bound, best_gain)
    gap = (bound - best_gain) / abs(best_gain) if best_gain else (math.inf if bound > 0 else 0.0)
    return Solution(
        tuple(int(r) for r in best),
        best_gain,
        total(cost, best),
        bound,
        gap,
        "optimal" if finished else "time_limit",
        used,
        time.perf_counter() - start,
        "; ".join(notes),
    )


class NoPlan(MpqError):
    """Nothing that may be chosen keeps the bounds."""


def no_plan(budget: float, least: float) -> NoPlan:
    """The sentence for a budget that the cheapest plan, which costs `least`, exceeds."""
    return NoPlan(
        f"No plan fits the budget {budget:.6g}: the cheapest costs {least:.6g}, with the least costly configuration of every "
        "group. Raise τ (the budget), or add a configuration that costs less."
    )


def _check(
    group: NDArray[Any], gain: Floats, cost: Floats, budget: float, solver: str, time_limit_s: float
) -> None:
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
        self.group, self.groups, self.rows = (
            self.open.group,
            len(self.open.starts),
            len(self.open.row),
        )
        largest, capacity = self.open.gain.max(), self.open.capacity
        self.scale = float(largest) if largest > 0 else 1.0
        self.gain = (self.open.gain / self.scale).astype(np.float64)
        self.costs = (self.open.cost / (capacity if capacity > 0 else 1)).astype(np.float64)
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


def _ask(
    solver: str, program: _Program, seconds: float
) -> tuple[Literal["highs", "gurobi"], _Answer, list[str]]:
    """The answer of the solver asked for, or of HiGHS where Gurobi cannot answer, with notes on why."""
    notes: list[str] = []
    if solver in ("auto", "gurobi"):
        try:
            if solver == "auto" and max(program.rows, program.groups + 1) > SIZE_LIMITED:
                raise _Unavailable(
                    f"{program.rows} variables are more than the {SIZE_LIMITED} of its free licence"
                )
            return "gurobi", _gurobi(program, seconds), notes
        except _Unavailable as why:
            notes.append(f"HiGHS instead of Gurobi: {why}")
            if solver == "gurobi":
                log.warning("Gurobi was asked for, but %s: HiGHS solves instead.", why)
    return "highs", _highs(program, seconds), notes


def _highs(program: _Program, seconds: float) -> _Answer:
    import highspy
    from highspy._core import _Highs

    n, groups = program.rows, program.groups
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n, groups + 1
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = program.gain, np.zeros(n), np.ones(n)
    lp.row_lower_, lp.row_upper_ = np.r_[np.ones(groups), -highspy.kHighsInf], np.ones(groups + 1)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(n + 1) * 2
    lp.a_matrix_.index_ = np.column_stack((program.group, np.full(n, groups))).ravel()
    lp.a_matrix_.value_ = np.column_stack((np.ones(n), program.costs)).ravel()
    lp.integrality_ = [highspy.HighsVarType.kInteger] * n
    lp.sense_ = highspy.ObjSense.kMaximize
    h = (
        _Highs()
    )  # highspy.Highs enables callbacks first, which prints the banner before it can be silenced
    h.setOptionValue("output_flag", False)  # before all else, or the banner is printed
    h.setOptionValue("threads", 1)
    for option in ("mip_rel_gap", "mip_abs_gap"):
        h.setOptionValue(option, 0.0)
    for option in (
        "mip_feasibility_tolerance",
        "primal_feasibility_tolerance",
        "dual_feasibility_tolerance",
    ):
        h.setOptionValue(option, 1e-10)
    h.setOptionValue(
        "small_matrix_value", 1e-12
    )  # its least; by default costs below 1e-9 would count as none
    h.passModel(lp)
    deadline, bound = time.perf_counter() + seconds, math.inf
    for _ in range(MAX_CUTS):
        h.setOptionValue("time_limit", h.getRunTime() + max(deadline - time.perf_counter(), 0.1))
        h.run()
        finished = h.getModelStatus() == highspy.HighsModelStatus.kOptimal
        info = h.getInfo()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return _Answer(None, bound, h.getModelStatus() == highspy.HighsModelStatus.kInfeasible)
        bound = min(bound, program.bound(info.mip_dual_bound))
        chosen, plan = program.read(np.array(h.getSolution().col_value))
        if program.fits(plan) or not finished:
            return _Answer(plan, bound, finished)
        h.addRow(
            -highspy.kHighsInf, groups - 1.0, groups, chosen.astype(np.int32), np.ones(groups)
        )  # not this plan again
    return _Answer(None, bound, False)


def _gurobi(program: _Program, seconds: float) -> _Answer:
    try:
        gp = importlib.import_module("gurobipy")
    except ImportError:
        raise _Unavailable("gurobipy is not installed") from None
    try:
        with gp.Env(empty=True) as env:
            env.setParam("OutputFlag", 0)
            env.start()
            with gp.Model(env=env) as model:
                return _gurobi_model(gp, model, program, seconds)
    except gp.GurobiError as error:  # no licence, an expired one, or one for smaller programs
        raise _Unavailable(f"it says: {str(error).strip().rstrip('.')}") from None


def _gurobi_model(gp: Any, model: Any, program: _Program, seconds: float) -> _Answer:
    for name, value in {
        "MIPGap": 0,
        "MIPGapAbs": 0,
        "FeasibilityTol": 1e-9,
        "IntFeasTol": 1e-9,
        "OptimalityTol": 1e-9,
    }.items():
        model.setParam(name, value)
    model.setParam("NumericFocus", 2)
    model.setParam("Threads", 1)  # ties are broken alike on every machine
    x = list(model.addVars(program.rows, vtype=gp.GRB.BINARY, obj=program.gain.tolist()).values())
    model.ModelSense = gp.GRB.MAXIMIZE
    ends = np.r_[program.open.starts, program.rows].tolist()
    for start, end in pairwise(ends):
        model.addConstr(gp.LinExpr([1.0] * (end - start), x[start:end]) == 1)
    model.addConstr(gp.LinExpr(program.costs.tolist(), x) <= 1)
    deadline, bound = time.perf_counter() + seconds, math.inf
    for _ in range(MAX_CUTS):
        model.setParam("TimeLimit", max(deadline - time.perf_counter(), 0.1))
        model.optimize()
        finished = model.Status == gp.GRB.OPTIMAL
        if not model.SolCount:
            return _Answer(None, bound, model.Status in (gp.GRB.INFEASIBLE, gp.GRB.INF_OR_UNBD))
        bound = min(bound, program.bound(model.ObjBound))
        chosen, plan = program.read(np.array(model.getAttr("X", x)))
        if program.fits(plan) or not finished:
            return _Answer(plan, bound, finished)
        model.addConstr(
            gp.quicksum(x[i] for i in chosen.tolist()) <= program.groups - 1
        )  # not this plan again
    return _Answer(None, bound, False)
