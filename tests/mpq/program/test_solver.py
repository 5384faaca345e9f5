"""The integer program against brute force, where float64 is hardest; the solvers, their absence, and mistakes."""

from __future__ import annotations

import itertools
import logging
import math
import sys

import numpy as np
import pytest

from mpq.errors import MpqError
from mpq.program import backends
from mpq.program.solver import Solution, solve

Instance = tuple[np.ndarray, np.ndarray, np.ndarray, float]


def instance(seed: int) -> Instance:
    """Up to five groups of up to five rows in any order; magnitudes from 1e-12 to 1, ties, zeros, negative gains."""
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 6))
    group = np.repeat(rng.permutation(groups) * 3 - 2, rng.integers(1, 6, groups))
    n = len(group)
    wide, other = 10.0 ** rng.uniform(-12, 0, (2, n))
    gain, cost = [
        (wide, other),
        (wide * rng.choice([-1, 1], n), other),
        (rng.integers(-3, 4, n).astype(float), rng.integers(0, 5, n) * 1e-12),
        (wide * rng.choice([1.0, 1e-6]), wide),
        (
            wide * rng.choice([-1, 0, 1], n),
            10.0 ** rng.uniform(-12, -10, n) * rng.integers(0, 2, n),
        ),
    ][seed % 5]
    group = group[rng.permutation(n)]
    of = [np.flatnonzero(group == g) for g in np.unique(group)]
    low, high = math.fsum(cost[r].min() for r in of), math.fsum(cost[r].max() for r in of)
    budget = [
        low,
        low + (high - low) * rng.random(),
        math.fsum(cost[rng.choice(r)] for r in of),  # some plan takes it to the last bit
        low * 10.0 ** rng.uniform(0, 2),
    ][int(rng.integers(4))]
    return group, gain, cost, budget or 1e-12


def brute_force(group: np.ndarray, gain: np.ndarray, cost: np.ndarray, budget: float) -> float:
    """The largest gain of all plans within the budget."""
    plans = itertools.product(*(np.flatnonzero(group == g).tolist() for g in np.unique(group)))
    return max(
        math.fsum(gain[r] for r in plan)
        for plan in plans
        if math.fsum(cost[r] for r in plan) <= budget
    )


def assert_plan(
    solution: Solution, group: np.ndarray, gain: np.ndarray, cost: np.ndarray, budget: float
) -> None:
    """One row of each group in ascending order, within the budget, and the sums are those of the rows."""
    chosen = list(solution.chosen)
    assert group[chosen].tolist() == np.unique(group).tolist()
    assert solution.gain == math.fsum(gain[chosen])
    assert solution.cost == math.fsum(cost[chosen]) <= budget
    assert solution.bound >= solution.gain
    assert solution.gap >= 0


def steps(groups: int) -> Instance:
    """Of each group nothing, or 1 for 1, under half of all and a half: every reduced gain is zero, so no row can be fixed."""
    return (
        np.repeat(np.arange(groups), 2),
        np.tile([0.0, 1.0], groups),
        np.tile([0.0, 1.0], groups),
        groups // 2 + 0.5,
    )


def large(groups: int, rows: int) -> Instance:
    """Five ops a group: losses add up, times nearly do, over eight and three orders of magnitude."""
    rng = np.random.default_rng(0)
    lowered = (np.arange(rows)[:, None] >> np.arange(5)) & 1
    cost = (10.0 ** rng.uniform(-12, -4, (groups, 1, 5)) * lowered).sum(2)
    gain = (10.0 ** rng.uniform(-7, -4, (groups, 1, 5)) * lowered).sum(2) * rng.uniform(
        0.7, 1.1, (groups, rows)
    )
    return (
        np.repeat(np.arange(groups), rows),
        gain.ravel(),
        cost.ravel(),
        float(cost.max(1).sum() * 0.05),
    )


@pytest.mark.parametrize(
    ("solver", "seeds"), [("auto", range(2500)), ("highs", range(150)), ("gurobi", range(150))]
)
def test_equals_brute_force(solver: str, seeds: range) -> None:
    """Gains of 1e-12 to 1 and costs alike: the optimum to 1e-12 relative, never over budget."""
    for seed in seeds:
        program = instance(seed)
        solution = solve(*program, solver=solver)
        assert_plan(solution, *program)
        assert solution.status == "optimal", seed
        assert math.isclose(solution.gain, brute_force(*program), rel_tol=1e-12), seed


@pytest.mark.parametrize("solver", ["highs", "gurobi"])
def test_named_solvers_run(solver: str) -> None:
    """A solver asked for by name is really run, and agrees with the fronts."""
    used = {solve(*instance(seed), solver=solver).solver for seed in range(20)}
    assert used == {solver, "presolve"}
    solution = solve(*steps(60), solver=solver)
    assert (solution.solver, solution.status, solution.gain, solution.note) == (
        solver,
        "optimal",
        30.0,
        "",
    )


def test_solvers_alone_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fronts, the solvers' own answers are within the budget, bounded, and within tolerance of the optimum."""
    monkeypatch.setattr("mpq.program.solver.front", lambda *_: ([], False))
    for seed, solver in itertools.product(range(100), ("auto", "highs", "gurobi")):
        program = instance(seed)
        solution, best = solve(*program, solver=solver), brute_force(*program)
        assert_plan(solution, *program)
        assert solution.gain >= best - 1e-8 * np.abs(program[1]).max()
        assert solution.bound >= best - 1e-8 * np.abs(program[1]).max()


def test_a_wrong_solver_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that answers less than the optimum is not believed, and the note tells."""
    worst = lambda program, seconds: backends.Answer(program.core.starts, 0.0, True)  # noqa: E731
    monkeypatch.setattr(backends, "_highs", worst)
    solution = solve(*steps(6), solver="highs")
    assert solution.gain == 3.0
    assert "float64" in solution.note


def test_more_budget_never_gains_less() -> None:
    """The gain grows with the budget."""
    for seed in range(40):
        group, gain, cost, budget = instance(seed)
        gains = [solve(group, gain, cost, budget * factor).gain for factor in (1, 1.1, 2, 10, 1e6)]
        assert gains == sorted(gains)


def test_large_program() -> None:
    """10,000 groups of 32 configurations: within the budget, and within 1e-6 of the bound."""
    program = large(10_000, 32)
    solution = solve(*program)
    assert_plan(solution, *program)
    assert solution.gap <= 1e-6


def test_too_large_for_gurobi(caplog: pytest.LogCaptureFixture) -> None:
    """2,200 variables that nothing can fix: HiGHS solves, a warning and the note say why."""
    with caplog.at_level(logging.WARNING, "mpq"):
        solution = solve(*steps(1100), solver="gurobi")
    assert (solution.solver, solution.gain, solution.status) == ("highs", 550.0, "optimal")
    assert "HiGHS instead of Gurobi" in solution.note
    assert "Gurobi" in caplog.text


def test_no_gurobi(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where gurobipy cannot be imported HiGHS solves; only who asked for Gurobi is warned."""
    monkeypatch.setitem(sys.modules, "gurobipy", None)
    with caplog.at_level(logging.WARNING, "mpq"):
        assert solve(*steps(60), solver="auto").gain == 30.0
        assert not caplog.text
        solution = solve(*steps(60), solver="gurobi")
    assert solution.solver == "highs"
    assert "not installed" in solution.note
    assert "not installed" in caplog.text


def test_no_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Gurobi refuses to start HiGHS solves, and the note repeats what Gurobi said."""
    gurobipy = pytest.importorskip("gurobipy")

    def refuse(**_: object) -> None:
        raise gurobipy.GurobiError(10009, "License expired 2020-01-01")

    monkeypatch.setattr(gurobipy, "Env", refuse)
    solution = solve(*steps(60), solver="gurobi")
    assert (solution.solver, solution.gain) == ("highs", 30.0)
    assert "License expired" in solution.note


@pytest.mark.parametrize("solver", ["highs", "gurobi"])
def test_silent(solver: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither banner nor log."""
    solve(*steps(60), solver=solver)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": [0.0, math.nan]}, r"The gain of row 1 \(group 7\) is nan"),
        ({"cost": [math.inf, 0.0]}, r"The cost of row 0 \(group 7\) is inf"),
        ({"budget": math.nan}, "must be finite and above zero, got nan"),
        ({"budget": math.inf}, "must be finite and above zero, got inf"),
        ({"budget": 0.0}, "must be finite and above zero, got 0.0"),
        ({"budget": -1.0}, "must be finite and above zero, got -1.0"),
        ({"budget": 1e-13}, "No plan fits the budget 1e-13: the cheapest costs 1e-12"),
        ({"gain": [1.0]}, "of one length"),
        ({"group": [], "gain": [], "cost": []}, "nothing to choose from"),
        ({"solver": "cbc"}, "no solver 'cbc'"),
        ({"time_limit_s": 0.0}, "time limit"),
    ],
)
def test_mistakes(change: dict[str, object], message: str) -> None:
    """What is no program is refused in a sentence that names the row or the number."""
    arguments = {
        "group": [7, 7],
        "gain": [0.0, 1.0],
        "cost": [1e-12, 2e-12],
        "budget": 1.0,
    } | change
    with pytest.raises(MpqError, match=message):
        solve(**arguments)
