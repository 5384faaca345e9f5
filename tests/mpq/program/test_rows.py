"""Several bounds at once: against brute force, and what is said where no plan keeps them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.errors import MpqError
from mpq.program.rows import Row, solve_within
from mpq.program.solver import NoPlan


def program(seed: int) -> tuple[np.ndarray, np.ndarray, list[Row]]:
    """Up to five groups of up to four choices, one to four rows from 1e-12 to 1e9, some of them lower bounds."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(rng.integers(1, 6)) * 2, rng.integers(1, 5))
    group = group[rng.permutation(len(group))]
    gain = rng.choice([-1, 1], len(group)) * 10.0 ** rng.uniform(-6, 0, len(group))
    rows = []
    for i in range(int(rng.integers(1, 5))):
        size = 10.0 ** rng.integers(-12, 10)
        values = rng.integers(0, 9, len(group)) * size
        plan = [rng.choice(np.flatnonzero(group == g)) for g in np.unique(group)]
        limit = math.fsum(values[plan]) * rng.choice([1.0, 1.0, 0.8])
        if rng.random() < 0.3:
            rows.append(Row(f"row{i}", -values, -limit, per=-1.0))
        else:
            rows.append(Row(f"row{i}", values, limit))
    return group, gain, rows


def plans(group: np.ndarray) -> itertools.product:
    return itertools.product(*(np.flatnonzero(group == g).tolist() for g in np.unique(group)))


def keeps(rows: list[Row], plan: tuple[int, ...]) -> bool:
    return all(math.fsum(row.values[list(plan)]) <= row.limit for row in rows)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(["auto", "highs", "gurobi"]))
def test_as_brute_force(seed: int, solver: str) -> None:
    """The largest gain of all plans that keep every row; where none does, that is told, with rows
    that indeed no plan keeps together."""
    group, gain, rows = program(seed)
    fitting = [plan for plan in plans(group) if keeps(rows, plan)]
    if not fitting:
        with pytest.raises(NoPlan) as told:
            solve_within(group, gain, rows, solver=solver)
        named = [row for row in rows if row.name in str(told.value)]
        if named:
            assert not any(keeps(named, plan) for plan in plans(group))
        return
    found = solve_within(group, gain, rows, solver=solver)
    best = max(math.fsum(gain[list(plan)]) for plan in fitting)
    assert keeps(rows, found.chosen)
    assert group[list(found.chosen)].tolist() == np.unique(group).tolist()
    assert found.gain == math.fsum(gain[list(found.chosen)])
    assert found.gain >= best - 1e-8 * np.abs(gain).max()
    assert found.bound >= best - 1e-8 * np.abs(gain).max()


def test_rows_that_clash_are_named() -> None:
    """Of three rows the two that clash are named, and by how much they are missed at least."""
    group, gain = np.array([0, 0, 1, 1]), np.array([0.0, 1.0, 0.0, 1.0])
    bits = Row("effective_bits", np.array([16.0, 8.0, 16.0, 8.0]), 20.0, per=2.0)
    share = Row("share of bf16", np.array([-1.0, 0.0, -1.0, 0.0]), -2.0, per=-2.0)
    loss = Row("loss MSE", np.array([0.0, 1e-6, 0.0, 1e-6]), 1e-5, "nats²")
    with pytest.raises(NoPlan) as told:
        solve_within(group, gain, [loss, bits, share])
    text = str(told.value)
    assert "effective_bits ≤ 10 and share of bf16 ≥ 1 together" in text
    assert "loss" not in text
    assert "effective_bits 16 (6 too much)" in text or "(0.5 too little)" in text or "(1" in text
    with pytest.raises(NoPlan, match=r"No plan keeps effective_bits ≤ 7: .* 8 \(1 too much\)"):
        solve_within(group, gain, [loss, Row("effective_bits", bits.values, 14.0, per=2.0)])


def test_a_bound_that_is_met_exactly() -> None:
    """The cheapest plan of a row may be its bound: it is taken, whatever the other rows leave free."""
    group, gain = np.array([0, 0, 1, 1]), np.array([0.0, 1.0, 0.0, 1.0])
    size = Row("weight_bytes", np.array([16.0, 8.0, 16.0, 8.0]), 16.0)
    loss = Row("loss MSE", np.array([0.0, 1e-12, 0.0, 1e-12]), 2e-12)
    for rows in ([size, loss], [loss, size], [size]):
        assert solve_within(group, -gain, rows).chosen == (1, 3)


def test_the_gap_of_a_plan_that_gains_nothing() -> None:
    """Where more than nothing could be gained its gap is infinite, as (bound - gain) / gain is; else there is none."""
    several = [Row(name, np.array([0.0, 2.0, 0.0, 2.0]), 1.0) for name in ("a", "b")]
    found = solve_within(np.array([0, 0, 1, 1]), np.array([0.0, 1.0, 0.0, 1.0]), several)
    assert (found.gain, found.bound, found.gap) == (0.0, 0.0, 0.0)
    assert replace(found, bound=1.0).gap == math.inf
    assert replace(found, gain=2.0, bound=3.0).gap == 0.5


def test_values_that_are_no_numbers() -> None:
    """A row with a NaN is told by its name."""
    with pytest.raises(MpqError, match="weight_bytes has a value or a bound"):
        solve_within(
            np.array([0]), np.array([1.0]), [Row("weight_bytes", np.array([math.nan]), 1.0)] * 2
        )
