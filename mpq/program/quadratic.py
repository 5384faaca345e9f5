"""The multiple-choice program under the loss MSE with signs (signed.py): a convex quadratic bound,
others linear beside it.

Gurobi takes the quadratic as it is. HiGHS is given its tangents, a square at a time: t_k ≥ 2 y y_k
− y² holds of t_k = y_k² whatever y is, so every program with tangents is a relaxation, whose bound
holds. They are added where its solution is, first without integrality, until a solution keeps the
bound. A plan counts only once its loss MSE, summed exactly in float64, does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpq.errors import MpqError
from mpq.program.backends import Answer, ask, exclude, highs_model
from mpq.program.presolve import Floats, Ints, total
from mpq.program.rows import Linear, Row, clash, keeps
from mpq.program.signed import Terms
from mpq.program.solver import NoPlan, Solution, SolverName, check

NAME, UNIT = "loss MSE with signs", "nats²"
NEGLIGIBLE = 1e-10  # of the largest singular value: directions in which nothing moves but rounding
TOUCHING = (
    1e-8  # of the budget: over by less, a solution has its tangents, and is cut off by itself
)
WIDE = 1e-6  # of the budget, which Gurobi is given more: else it misses plans at the bound
ROUNDS = 60  # of tangents without integrality


def solve_signed(
    group: Ints,
    gain: Floats,
    terms: Terms,
    budget: float,
    rows: Sequence[Row] = (),
    *,
    solver: SolverName = "auto",
    time_limit_s: float = 60.0,
) -> Solution:
    """Choose exactly one row of each group so that Σ gain is largest, the loss MSE of the `terms`
    of what is chosen is at most `budget` (nats²), and every one of `rows` holds.

    `group` and `gain` are of shape (rows,), as in solver.solve; `cost` of the solution is its loss
    MSE. Raises MpqError for what is no program, NoPlan where no plan keeps the bounds, or none was
    found in time.
    """
    start = time.perf_counter()
    check(group, gain, terms.activations, budget, solver, time_limit_s)
    if not (np.isfinite(terms.effects).all() and np.isfinite(terms.drift).all()):
        raise MpqError("An effect, or a KL, is no finite number: measure sensitivity again.")
    number = np.unique(group, return_inverse=True)[1].astype(np.int64).ravel()
    program = _Signed(number, gain, terms, budget, rows)
    if not program.possible:
        raise _no_plan(program, number, rows)
    program.offer(program.start)
    used, answer, notes = ask(solver, program, time_limit_s, program.in_gurobi, program.in_highs)
    if answer.plan is not None:
        program.offer(program.places(answer.plan))
    if program.best is None:
        if answer.finished:
            raise _no_plan(program, number, rows)
        raise NoPlan(f"{used} found no plan within the bounds in {time_limit_s:g} s: loosen one.")
    best = total(gain, program.best)
    bound = max(answer.bound, best)
    return Solution(
        tuple(int(r) for r in program.best),
        best,
        terms.mse(program.best),
        bound,
        "optimal" if answer.finished and math.isfinite(bound) else "time_limit",
        used,
        time.perf_counter() - start,
        "; ".join(notes),
    )


class _Signed(Linear):
    """The linear rows, the activations' part of the loss MSE among them, and the quadratic over
    the budget: Σ_k (`moves` x)_k² + `alone` x ≤ 1, `moves` (directions, rows). `best` is the
    best plan that was offered, in the caller's rows."""

    def __init__(
        self, group: Ints, gain: Floats, terms: Terms, budget: float, rows: Sequence[Row]
    ) -> None:
        activations = Row(NAME, terms.activations, budget, UNIT)
        super().__init__(group, gain, [*rows, activations])
        self.terms, self.budget = terms, budget
        self.best: Ints | None = None
        self.nearest: Ints | None = None
        moved = terms.effects + terms.drift[:, None]
        scaled = moved[self.row] / math.sqrt(budget * moved.shape[1])
        across, sizes, _ = np.linalg.svd(scaled, full_matrices=False)
        some = sizes > NEGLIGIBLE * sizes.max(initial=0.0)
        self.moves = np.ascontiguousarray((across * sizes).T[some])
        self.alone = terms.activations[self.row] / budget

    @property
    def start(self) -> Ints:
        """Of each group the choice that moves the loss least by itself, as places."""
        alone = np.square(self.moves).sum(0) + self.alone
        return np.lexsort((alone, self.group))[self.starts].astype(np.int64)

    @property
    def starts(self) -> Ints:
        return np.flatnonzero(np.diff(self.group, prepend=-1))

    def places(self, plan: Ints) -> Ints:
        """Of a plan in the caller's rows."""
        return np.flatnonzero(np.isin(self.row, plan)).astype(np.int64)

    def fits(self, plan: Ints) -> bool:
        """Whether each bound holds, summed exactly."""
        return super().fits(plan) and self.terms.mse(plan) <= self.budget

    def offer(self, places: Ints) -> None:
        """Make a plan keep the bounds, and then gain more, one choice after the other; the best
        one stays."""
        plan = self.row[self._polished(places)]
        if not self.fits(plan):
            self.nearest = plan if self.nearest is None else self.nearest
        elif self.best is None or total(self.whole, plan) > total(self.whole, self.best):
            self.best = plan

    def reached(self, bound: float) -> bool:
        """Whether no plan can gain more than the best one, up to what solvers tolerate."""
        return self.best is not None and bound - total(self.whole, self.best) <= 1e-9 * self.scale

    def _polished(self, plan: Ints) -> Ints:
        plan = plan.copy()
        for _ in range(4 * self.groups):
            now = plan[self.group]
            moved = self.moves[:, plan].sum(1)
            step = self.moves - self.moves[:, now]
            square = moved @ moved + 2 * moved @ step + np.square(step).sum(0)
            sums = [square + self.alone[plan].sum() + self.alone - self.alone[now]]
            sums += [cost[plan].sum() + cost - cost[now] for cost in self.costs]
            over = sum(np.maximum(of - 1, 0.0) for of in sums)
            more, own = self.gain - self.gain[now], over[plan[0]]
            if own > 0 and not self.fits(self.row[plan]):
                less = own - over
                rate = np.where(less > 1e-12 * own, more / np.maximum(less, 1e-300), -np.inf)
                at = int(rate.argmax())
                if rate[at] == -np.inf:
                    break
            else:
                rate = np.where(over <= 0, more, 0.0)
                at = int(rate.argmax())
                if rate[at] <= 1e-15:
                    break
            plan[self.group[at]] = at
        return plan

    def in_gurobi(self, gp: Any, model: Any, x: list[Any]) -> None:
        """Add the quadratic bound to Gurobi's model, each direction a variable of its own."""
        y = list(model.addVars(len(self.moves), lb=-gp.GRB.INFINITY).values())
        for direction, value in zip(self.moves.tolist(), y, strict=True):
            model.addConstr(gp.LinExpr(direction, x) == value)
        squares = gp.quicksum(value * value for value in y)
        model.addConstr(squares + gp.LinExpr(self.alone.tolist(), x) <= 1 + WIDE)

    def in_highs(self, _: Any, seconds: float) -> Answer:
        """HiGHS's answer to the program with tangents, more of them until it keeps the bound or
        no better plan can be."""
        import highspy

        deadline, n, count = time.perf_counter() + seconds, self.rows, len(self.moves)
        h, types = highs_model(self), highspy.HighsVarType
        for _ in range(count):
            h.addVar(-highspy.kHighsInf, highspy.kHighsInf)  # y_k
        for _ in range(count):
            h.addVar(0.0, 1.0)  # t_k ≥ y_k²
        every = np.arange(n, dtype=np.int32)
        for k, direction in enumerate(self.moves):
            at = np.append(every, np.int32(n + k))
            h.addRow(0.0, 0.0, n + 1, at, np.append(direction, -1.0))
        at = np.append(every, np.arange(n + count, n + 2 * count, dtype=np.int32))
        h.addRow(-highspy.kHighsInf, 1.0, n + count, at, np.append(self.alone, np.ones(count)))

        def touch(y: Floats) -> None:
            for k, value in enumerate(y.tolist()):
                at = np.array([n + k, n + count + k], dtype=np.int32)
                slope = np.array([2 * value, -1.0])
                h.addRow(-highspy.kHighsInf, value * value, 2, at, slope)

        def run() -> Floats | None:
            left = max(deadline - time.perf_counter(), 0.1)
            h.setOptionValue("time_limit", h.getRunTime() + left)
            h.run()
            known = h.getInfo().primal_solution_status
            feasible = known == highspy.SolutionStatus.kSolutionStatusFeasible
            return np.array(h.getSolution().col_value[:n]) if feasible else None

        touch(np.zeros(count))
        if self.best is not None:
            touch(self.moves[:, self.places(self.best)].sum(1))
        h.changeColsIntegrality(n, every, [types.kContinuous] * n)
        for _ in range(ROUNDS):
            values = run()
            if values is None or time.perf_counter() > deadline:
                break
            y = self.moves @ values
            if y @ y + self.alone @ values <= 1 + 1e-6:
                break
            touch(y)
        h.changeColsIntegrality(n, every, [types.kInteger] * n)
        bound = math.inf
        while True:
            values = run()
            finished = h.getModelStatus() == highspy.HighsModelStatus.kOptimal
            if values is None:
                finished = h.getModelStatus() == highspy.HighsModelStatus.kInfeasible
                # what is left has no plan: the best that was found, if any, is the best of all
                reached = -math.inf if self.best is None else total(self.whole, self.best)
                return Answer(self.best, reached if finished else bound, finished)
            bound = min(bound, self.bound(h.getInfo().mip_dual_bound))
            chosen, plan = self.read(values)
            self.offer(chosen)
            settled = (finished and self.fits(plan)) or self.reached(bound)
            if settled or time.perf_counter() > deadline:
                return Answer(self.best, bound, settled)
            y = self.moves[:, chosen].sum(1)
            if y @ y + self.alone[chosen].sum() > 1 + TOUCHING:
                touch(y)
            else:
                exclude(h, chosen)


def _no_plan(program: _Signed, group: Ints, rows: Sequence[Row]) -> NoPlan:
    """The bounds that no plan keeps together, and how near a plan came that was found."""
    if rows and not keeps(group, rows):
        return clash(group, rows)
    bounds = " and ".join([*(row.bound for row in rows), f"{NAME} ≤ {program.budget:.6g} {UNIT}"])
    near = ""
    if program.nearest is not None:
        near = f": the nearest that was found has {program.terms.mse(program.nearest):.6g}"
    return NoPlan(
        f"No plan keeps {bounds}{' together' if rows else ''}{near}. Loosen a bound, or allow more formats."
    )
