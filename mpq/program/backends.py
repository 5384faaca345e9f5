"""What HiGHS and Gurobi are asked: a multiple-choice knapsack of one or more rows, scaled, and what they answer.

Neither is believed: a plan that does not fit in float64 is cut off, and the solver asked again.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np

from mpq.program.presolve import Floats, Ints

log = logging.getLogger("mpq")

SIZE_LIMITED = 2_000  # variables, and constraints, of Gurobi's licence that comes with pip
MAX_CUTS = 20  # plans over budget that a solver may return before its answer is dropped


class Program(Protocol):
    """A program as a solver sees it: of `group` (rows,) one each, Σ gain largest, each row of `costs` (k, rows) at most 1."""

    group: Ints
    groups: int
    rows: int
    gain: Floats
    costs: Floats

    def read(self, values: Floats) -> tuple[Ints, Ints]:
        """Which rows a solver chose, and the plan as its owner names it."""

    def fits(self, plan: Ints) -> bool:
        """Whether the plan keeps its bounds in float64."""

    def bound(self, objective: float) -> float:
        """The owner's bound on the gain, from the solver's."""


@dataclass(frozen=True)
class Answer:
    """What a solver says: a plan (places in the core) or none, its bound above the base, and whether it finished."""

    plan: Ints | None
    bound: float
    finished: bool


Ask = Callable[[Program, float], Answer]
Further = Callable[[Any, Any, list[Any]], None]  # gurobipy, the model, its binaries


class Unavailable(Exception):
    """Why Gurobi cannot be used, in words for the note."""


def ask(
    solver: str,
    program: Program,
    seconds: float,
    in_gurobi: Further | None = None,
    in_highs: Ask | None = None,
) -> tuple[Literal["highs", "gurobi"], Answer, list[str]]:
    """The answer of the solver asked for, or of HiGHS where Gurobi cannot answer, with notes on why.

    What is more than linear comes from elsewhere (quadratic.py): `in_gurobi` adds it to Gurobi's model, `in_highs` asks HiGHS.
    """
    notes: list[str] = []
    if solver in ("auto", "gurobi"):
        size = max(program.rows, program.groups + len(program.costs))
        try:
            if solver == "auto" and size > SIZE_LIMITED:
                raise Unavailable(
                    f"{program.rows} variables are more than the {SIZE_LIMITED} of its free licence"
                )
            return "gurobi", _gurobi(program, seconds, in_gurobi), notes
        except Unavailable as why:
            notes.append(f"HiGHS instead of Gurobi: {why}")
            if solver == "gurobi":
                log.warning("Gurobi was asked for, but %s: HiGHS solves instead.", why)
    return "highs", (in_highs or _highs)(program, seconds), notes


def highs_model(program: Program) -> Any:
    """The program in HiGHS, silent and with its tightest tolerances."""
    import highspy
    from highspy._core import _Highs

    n, groups, k = program.rows, program.groups, len(program.costs)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n, groups + k
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = program.gain, np.zeros(n), np.ones(n)
    lp.row_lower_ = np.r_[np.ones(groups), np.full(k, -highspy.kHighsInf)]
    lp.row_upper_ = np.ones(groups + k)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(n + 1) * (1 + k)
    rows_of_costs = (np.full(n, groups + i) for i in range(k))
    lp.a_matrix_.index_ = np.column_stack((program.group, *rows_of_costs)).ravel()
    lp.a_matrix_.value_ = np.column_stack((np.ones(n), *program.costs)).ravel()
    lp.integrality_ = [highspy.HighsVarType.kInteger] * n
    lp.sense_ = highspy.ObjSense.kMaximize
    # highspy.Highs enables callbacks first, which prints the banner before it can be silenced
    h = _Highs()
    for option, value in {
        "output_flag": False,  # before all else, or the banner is printed
        "threads": 1,
        "mip_rel_gap": 0.0,
        "mip_abs_gap": 0.0,
        "mip_feasibility_tolerance": 1e-10,
        "primal_feasibility_tolerance": 1e-10,
        "dual_feasibility_tolerance": 1e-10,
        "small_matrix_value": 1e-12,  # its least; by default costs below 1e-9 would count as none
    }.items():
        h.setOptionValue(option, value)
    h.passModel(lp)
    return h


def exclude(h: Any, chosen: Ints) -> None:
    """Cut a plan off in HiGHS: the rows `chosen`, one of each group, not all together again."""
    import highspy

    n = len(chosen)
    h.addRow(-highspy.kHighsInf, n - 1.0, n, chosen.astype(np.int32), np.ones(n))


def least_violation(program: Program, seconds: float) -> Ints | None:
    """The plan that exceeds the rows of costs least, summed over rows, whatever it gains; None where time is up."""
    import highspy

    h, n = highs_model(program), program.rows
    h.setOptionValue("time_limit", seconds)
    h.changeColsCost(n, np.arange(n, dtype=np.int32), np.zeros(n))
    for i in range(len(program.costs)):  # what a row is exceeded by
        at = np.array([program.groups + i], dtype=np.int32)
        h.addCol(-1.0, 0.0, highspy.kHighsInf, 1, at, np.array([-1.0]))
    h.run()
    if h.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    return program.read(np.array(h.getSolution().col_value[:n]))[1]


def _highs(program: Program, seconds: float) -> Answer:
    import highspy

    h = highs_model(program)
    deadline, bound = time.perf_counter() + seconds, math.inf
    for _ in range(MAX_CUTS):
        h.setOptionValue("time_limit", h.getRunTime() + max(deadline - time.perf_counter(), 0.1))
        h.run()
        finished = h.getModelStatus() == highspy.HighsModelStatus.kOptimal
        info = h.getInfo()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return Answer(None, bound, h.getModelStatus() == highspy.HighsModelStatus.kInfeasible)
        bound = min(bound, program.bound(info.mip_dual_bound))
        chosen, plan = program.read(np.array(h.getSolution().col_value))
        if program.fits(plan) or not finished:
            return Answer(plan, bound, finished)
        exclude(h, chosen)
    return Answer(None, bound, False)


def _gurobi(program: Program, seconds: float, further: Further | None) -> Answer:
    try:
        gp = importlib.import_module("gurobipy")
    except ImportError:
        raise Unavailable("gurobipy is not installed") from None
    try:
        with gp.Env(empty=True) as env:
            env.setParam("OutputFlag", 0)
            env.start()
            with gp.Model(env=env) as model:
                return _gurobi_model(gp, model, program, seconds, further)
    except gp.GurobiError as error:  # no licence, an expired one, or one for smaller programs
        raise Unavailable(f"it says: {str(error).strip().rstrip('.')}") from None


def _gurobi_model(
    gp: Any, model: Any, program: Program, seconds: float, further: Further | None
) -> Answer:
    for name, value in {
        "MIPGap": 0,
        "MIPGapAbs": 0,
        "FeasibilityTol": 1e-9,
        "IntFeasTol": 1e-9,
        "OptimalityTol": 1e-9,
        "NumericFocus": 2,
        "Threads": 1,  # ties are broken alike on every machine
    }.items():
        model.setParam(name, value)
    x = list(model.addVars(program.rows, vtype=gp.GRB.BINARY, obj=program.gain.tolist()).values())
    model.ModelSense = gp.GRB.MAXIMIZE
    ends = [*np.flatnonzero(np.diff(program.group, prepend=-1)).tolist(), program.rows]
    for start, end in pairwise(ends):
        model.addConstr(gp.LinExpr([1.0] * (end - start), x[start:end]) == 1)
    for row in program.costs.tolist():
        model.addConstr(gp.LinExpr(row, x) <= 1)
    if further:
        further(gp, model, x)
    deadline, bound = time.perf_counter() + seconds, math.inf
    for _ in range(MAX_CUTS):
        model.setParam("TimeLimit", max(deadline - time.perf_counter(), 0.1))
        model.optimize()
        finished = model.Status == gp.GRB.OPTIMAL
        if not model.SolCount:
            return Answer(None, bound, model.Status in (gp.GRB.INFEASIBLE, gp.GRB.INF_OR_UNBD))
        bound = min(bound, program.bound(model.ObjBound))
        chosen, plan = program.read(np.array(model.getAttr("X", x)))
        if program.fits(plan) or not finished:
            return Answer(plan, bound, finished)
        # not this plan again
        model.addConstr(gp.quicksum(x[i] for i in chosen.tolist()) <= program.groups - 1)
    return Answer(None, bound, False)
