"""The program against brute force, over the range of numbers where solvers go wrong."""

from __future__ import annotations

import itertools
import logging
import math
import sys

import numpy as np
import pytest

from mpq import solver as module
from mpq.errors import MpqError
from mpq.solver import solve


def instance(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """A random program of up to 5 groups × 5 rows; gains and costs span 1e-12 to 1; some zero, negative, tied."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, rng.integers(1, 6))
    group = np.repeat(np.arange(len(sizes)), sizes)
    gain, cost = (10.0 ** rng.uniform(-12, 0, len(group)) for _ in range(2))
    if seed % 3 == 0:  # of one size, so that many rows matter
        gain, cost = rng.uniform(0, 1e-9, len(group)), rng.uniform(0, 1e-9, len(group))
    gain *= rng.choice([1, -1], len(group), p=[0.8, 0.2])
    cost[rng.random(len(group)) < 0.1] = 0.0
    if seed % 5 == 0:
        gain, cost = np.round(gain, 10), np.round(cost, 10)
    least = sum(cost[group == j].min() for j in range(len(sizes)))
    most = sum(cost[group == j].max() for j in range(len(sizes)))
    budget = (least + rng.choice([0.02, 0.3, 0.7, 1.1]) * (most - least)) * (1 + 1e-9)
    return group, gain, cost, float(max(budget, 1e-12))


def brute_force(group: np.ndarray, gain: np.ndarray, cost: np.ndarray, budget: float) -> float:
    """The largest gain of any choice within the budget, by trying all."""
    rows = [np.flatnonzero(group == j) for j in np.unique(group)]
    kept = (c for c in itertools.product(*rows) if math.fsum(cost[list(c)]) <= budget)
    return max(math.fsum(gain[list(c)]) for c in kept)


def agrees(seed: int, name: str) -> None:
    """The solver's answer is a choice within the budget of the brute force's gain."""
    group, gain, cost, budget = instance(seed)
    solution = solve(group, gain, cost, budget, solver=name)
    assert solution.cost <= budget
    assert list(group[list(solution.chosen)]) == sorted(set(group))
    assert solution.gain == pytest.approx(brute_force(group, gain, cost, budget), rel=1e-12, abs=1e-300), seed
    assert solution.status == "optimal"
    assert solution.bound >= solution.gain


@pytest.mark.parametrize("batch", range(10))
def test_equals_brute_force(batch: int) -> None:
    """Two thousand small programs, whichever solver `auto` takes."""
    for seed in range(batch * 200, batch * 200 + 200):
        agrees(seed, "auto")


@pytest.mark.parametrize("name", ["highs", "gurobi"])
def test_each_solver_equals_brute_force(name: str) -> None:
    """The same with a solver named."""
    for seed in range(10_000, 10_300):
        agrees(seed, name)


def hard(groups: int, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Gains nearly proportional to costs: presolve can drop little."""
    rng = np.random.default_rng(seed)
    cost = np.sort(rng.uniform(1e-9, 1e-7, (groups, rows)), axis=1)
    cost[:, 0] = 0
    gain = cost * 1e4 * (1 + 1e-3 * rng.uniform(size=cost.shape))
    return np.repeat(np.arange(groups), rows), gain.ravel(), cost.ravel(), float(cost.sum() / rows)


@pytest.mark.parametrize("name", ["highs", "gurobi"])
def test_both_solvers_really_solve(name: str) -> None:
    """On a program that presolve cannot finish, the named solver runs and both find the same gain."""
    solution = solve(*hard(12, 6), solver=name)
    assert solution.solver == name
    assert solution.gain == pytest.approx(solve(*hard(12, 6)).gain, rel=1e-9)


def test_solvers_answers_stand_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the dynamic program each solver's own answer is right to its tolerance and within budget."""
    monkeypatch.setattr(module, "_dynamic_program", lambda *a: None)
    for seed in range(40):
        group, gain, cost, budget = hard(6, 4, seed)
        for name in ("highs", "gurobi"):
            solution = solve(group, gain, cost, budget, solver=name)
            assert solution.cost <= budget
            assert solution.gain == pytest.approx(brute_force(group, gain, cost, budget), rel=1e-6)


def test_gurobi_too_small_falls_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Beyond the pip licence HiGHS solves, and both the log and the solution say so."""
    monkeypatch.setattr(module, "GUROBI_PIP_VARIABLES", 10)
    monkeypatch.setattr(module, "_licence_is_limited", lambda: True)
    with caplog.at_level(logging.WARNING, "mpq"):
        solution = solve(*hard(12, 6), solver="gurobi")
    assert solution.solver == "highs"
    assert "licence serves" in solution.note
    assert "licence serves" in caplog.text


def test_gurobi_missing_falls_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without gurobipy HiGHS solves; it is logged where Gurobi was asked for, recorded always."""
    monkeypatch.setitem(sys.modules, "gurobipy", None)
    module._environment.cache_clear()
    with caplog.at_level(logging.WARNING, "mpq"):
        solution = solve(*hard(12, 6), solver="gurobi")
    assert (solution.solver, "not installed" in solution.note, "not installed" in caplog.text) == ("highs", True, True)
    assert "not installed" in solve(*hard(12, 6)).note


def test_a_large_program() -> None:
    """10,000 groups × 32 configurations: within budget, and proved to within 1e-6 of the optimum."""
    rng = np.random.default_rng(0)
    cost = np.cumsum(rng.exponential(1e-8, (10_000, 32)), axis=1)
    gain = np.cumsum(rng.exponential(1e-4, (10_000, 32)), axis=1)
    budget = float(cost.sum() / 64)
    solution = solve(np.repeat(np.arange(10_000), 32), gain.ravel(), cost.ravel(), budget)
    assert solution.cost <= budget
    assert solution.gap <= 1e-6


def test_a_larger_budget_never_does_worse() -> None:
    """Gain grows with the budget."""
    group, gain, cost, budget = hard(8, 5)
    gains = [solve(group, gain, cost, budget * f).gain for f in (0.1, 0.3, 1.0, 1.5, 3.0)]
    assert gains == sorted(gains)


@pytest.mark.parametrize(
    ("gain", "cost", "budget", "message"),
    [
        ([1.0, math.nan], [0.0, 1.0], 1.0, "Row 1 has the gain nan"),
        ([1.0, 2.0], [0.0, math.inf], 1.0, "Row 1 has the cost inf"),
        ([1.0, 2.0], [3.0, 4.0], 1.0, "budget 1 cannot be kept: the cheapest .* costs 3"),
        ([1.0, 2.0], [0.0, 1.0], 0.0, "above zero, got 0"),
        ([1.0, 2.0], [0.0, 1.0], math.nan, "above zero, got nan"),
    ],
)
def test_bad_programs_are_told(gain: list[float], cost: list[float], budget: float, message: str) -> None:
    """Numbers that are none and budgets that cannot be kept."""
    with pytest.raises(MpqError, match=message):
        solve(np.zeros(2, int), np.array(gain), np.array(cost), budget)
