"""The program under the loss MSE with signs: both solvers against brute force, and what is said
where there is no plan."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.program.quadratic import solve_signed
from mpq.program.rows import Row
from mpq.program.signed import Terms
from mpq.program.solver import NoPlan

Instance = tuple[np.ndarray, np.ndarray, Terms, float, list[Row]]


def instance(seed: int) -> Instance:
    """Up to five groups of up to four choices, as losses have them: effects of either sign that
    may cancel, a drift of their square's size, activations; gains with ties; a size to keep
    beside it in some. The budget is a plan's own in some."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(rng.integers(1, 6)) * 2, rng.integers(1, 5))
    group = group[rng.permutation(len(group))]
    n, samples = len(group), int(rng.integers(1, 7))
    size = 10.0 ** rng.uniform(-6, -1, n) * rng.integers(0, 2, n)  # some choices are base
    effects = size[:, None] * rng.normal(rng.choice([-1, 0, 1], (n, 1)), 1.0, (n, samples))
    terms = Terms(effects, size**2, size**2 * rng.uniform(size=n), np.zeros(n))
    gain = rng.integers(-3, 6, n).astype(float) if seed % 2 else rng.normal(size=n)
    plans = list(every(group))
    some = np.array(plans[rng.integers(len(plans))])
    budget = terms.mse(some) * rng.choice([1.0, 1.0, 1.5, 0.5]) or 1e-9
    sizes = rng.integers(1, 9, n).astype(float)
    rows = [Row("weight_bytes", sizes, float(sizes[some].sum()), "bytes")] * int(rng.integers(0, 2))
    return group, gain, terms, budget, rows


def every(group: np.ndarray) -> itertools.product:
    return itertools.product(*(np.flatnonzero(group == g).tolist() for g in np.unique(group)))


def mse(terms: Terms, plan: tuple[int, ...]) -> float:
    """By its definition, a sample after the other."""
    rows, samples = list(plan), terms.effects.shape[1]
    drift = math.fsum(terms.drift[rows])
    moved = [math.fsum(terms.effects[rows, i]) + drift for i in range(samples)]
    return math.fsum(m * m for m in moved) / samples + math.fsum(terms.activations[rows])


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**6), st.sampled_from(["auto", "highs", "gurobi"]))
def test_as_brute_force(seed: int, solver: str) -> None:
    """The largest gain of all plans that keep every bound, with a bound that none exceeds; where
    none keeps them, that is told with the bounds' names."""
    group, gain, terms, budget, rows = instance(seed)
    fitting = [
        plan
        for plan in every(group)
        if mse(terms, plan) <= budget
        and all(math.fsum(row.values[list(plan)]) <= row.limit for row in rows)
    ]
    if not fitting:
        with pytest.raises(NoPlan, match="No plan keeps"):
            solve_signed(group, gain, terms, budget, rows, solver=solver)
        return
    found = solve_signed(group, gain, terms, budget, rows, solver=solver)
    best = max(math.fsum(gain[list(plan)]) for plan in fitting)
    assert found.status == "optimal"
    assert found.chosen in fitting
    assert found.cost == pytest.approx(mse(terms, found.chosen), rel=1e-12)
    assert found.gain == math.fsum(gain[list(found.chosen)])
    assert found.gain >= best - 1e-8 * np.abs(gain).max()
    assert found.bound >= best - 1e-8 * np.abs(gain).max()
    assert found.bound - found.gain <= 1e-6 * max(1e-12, np.abs(gain).max())


def test_bounds_that_no_plan_keeps_are_named() -> None:
    """A quadratic that cannot be kept with how near a plan came; rows that clash by themselves
    as without it."""
    group, gain = np.array([0, 0, 1]), np.array([0.0, 1.0, 0.0])
    effects = np.array([[0.3, -0.1], [0.2, 0.1], [-0.1, 0.2]])
    terms = Terms(effects, np.zeros(3), np.zeros(3), np.zeros(3))
    text = (
        r"No plan keeps loss MSE with signs ≤ 0\.02 nats²: the nearest that was found has 0\.025\."
    )
    for solver in ("highs", "gurobi"):
        with pytest.raises(NoPlan, match=text):
            solve_signed(group, gain, terms, 0.02, solver=solver)
        assert solve_signed(group, gain, terms, 0.026, solver=solver).chosen == (0, 2)
    size = Row("weight_bytes", np.array([3.0, 1.0, 1.0]), 2.0, "bytes")
    with pytest.raises(NoPlan, match=r"weight_bytes ≤ 2 bytes and loss MSE .* together"):
        solve_signed(group, gain, terms, 0.026, [size])
    with pytest.raises(NoPlan, match=r"^No plan keeps weight_bytes ≤ 1 bytes: the nearest has"):
        solve_signed(group, gain, terms, 0.026, [Row("weight_bytes", size.values, 1.0, "bytes")])


def test_larger_programs() -> None:
    """Fifty groups: HiGHS closes the gap with tangents alone, Gurobi with the quadratic itself
    finds the same gain, and no exchange of one or two choices keeps the bound and gains more."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(50), 4)
    size = np.tile([0.0, 1.0, 2.0, 4.0], 50) * np.repeat(np.exp(rng.normal(-6, 1, 50)), 4)
    effects = size[:, None] * rng.normal(size=(200, 8))
    terms = Terms(effects, size**2, size**2, np.zeros(200))
    gain = np.tile([0.0, 2.0, 3.0, 4.0], 50) * np.repeat(rng.uniform(1, 9, 50), 4)
    found = solve_signed(group, gain, terms, 2e-5, solver="highs")
    other = solve_signed(group, gain, terms, 2e-5, solver="gurobi")
    for each, solver in ((found, "highs"), (other, "gurobi")):
        assert (each.solver, each.status) == (solver, "optimal")
        assert each.gap <= 1e-9
    assert other.gain == pytest.approx(found.gain, rel=1e-9)
    moved = effects + terms.drift[:, None]
    now = np.array(found.chosen)
    for i in range(200):
        one = now.copy()
        one[group[i]] = i
        others = one[None].repeat(200, 0)
        others[np.arange(200), group] = np.arange(200)
        loss = np.square(moved[others].sum(1)).mean(1) + terms.activations[others].sum(1)
        assert gain[others].sum(1)[loss <= 2e-5].max(initial=0) <= found.gain + 1e-9
