"""The frontier against every plan of small programs, one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpq.errors import MpqError
from mpq.program.frontier import frontier
from mpq.program.rows import Row
from mpq.program.solver import NoPlan


def program(seed: int, groups: int = 5, rows: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups whose first row is base and whose others gain and cost something, costs over decades."""
    draw = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), rows)
    base = np.tile(np.arange(rows) == 0, groups)
    gain = np.where(base, 0.0, draw.uniform(0.1, 1.0, len(group)))
    cost = np.where(base, 0.0, 10.0 ** draw.uniform(-6, -3, len(group)))
    return group, gain, cost


def every_plan(group: np.ndarray) -> list[np.ndarray]:
    of = [np.flatnonzero(group == g) for g in np.unique(group)]
    return [np.array(plan) for plan in itertools.product(*of)]


def pareto(
    plans: list[np.ndarray], gain: np.ndarray, cost: np.ndarray
) -> list[tuple[float, float]]:
    """(cost, gain) of the plans that none other is at most as dear as and gains more than, by trying all."""
    found = sorted({(cost[p].sum(), gain[p].sum()) for p in plans}, key=lambda x: (x[0], -x[1]))
    kept: list[tuple[float, float]] = []
    for c, g in found:
        if not kept or g > kept[-1][1] + 1e-15:
            kept.append((c, g))
    return kept


@pytest.mark.parametrize("seed", range(6))
def test_every_point_is_pareto_optimal(seed: int) -> None:
    """Each point is one of brute force's, its bound no less than its gain, both ends are there, and many points find most."""
    group, gain, cost = program(seed)
    best = np.array(pareto(every_plan(group), gain, cost))
    for points in (4, 400):
        found = frontier(group, gain, cost, points)
        assert len(found) <= points
        for point in found:
            assert np.isclose(best, [point.cost, point.gain], rtol=1e-9, atol=0).all(1).any()
            assert point.certified
            assert sorted(group[list(point.rows)]) == list(range(5))
        assert (found[0].cost, found[0].gain) == pytest.approx(tuple(best[0]))
        assert (found[-1].cost, found[-1].gain) == pytest.approx(tuple(best[-1]))
        costs = [point.cost for point in found]
        assert costs == sorted(costs)
    assert len(found) >= 0.8 * len(best)


def test_points_keep_further_bounds() -> None:
    """With a bound beside the cost every point keeps it, and is the best of those that do, by trying all."""
    group, gain, cost = program(7)
    size = np.where(gain > 0, 1.0, 2.0) * (1 + group)
    row = Row("size", size, 24.0)
    plans = [p for p in every_plan(group) if size[p].sum() <= 24.0]
    best = np.array(pareto(plans, gain, cost))
    found = frontier(group, gain, cost, 30, [row])
    assert len(found) > 5
    for point in found:
        assert size[list(point.rows)].sum() <= 24.0
        assert np.isclose(best, [point.cost, point.gain], rtol=1e-9, atol=1e-15).all(1).any()
    with pytest.raises(NoPlan, match="size"):
        frontier(group, gain, cost, 30, [Row("size", size, 1.0)])


def test_what_one_more_op_costs() -> None:
    """From each point but the last the step is, by trying each row, the change of one group that costs least for its gain."""
    group, gain, cost = program(3)
    found = frontier(group, gain, cost, 50)
    assert found[-1].step is None or found[-1].step.gain > 0
    for point in found[:-1]:
        ratios = []
        for row in range(len(group)):
            now = next(r for r in point.rows if group[r] == group[row])
            more, worse = gain[row] - gain[now], cost[row] - cost[now]
            if more > 0 and worse > 0:
                ratios.append((worse / more, row, more, worse))
        _, row, more, worse = min(ratios)
        assert (point.step.row, point.step.gain, point.step.cost) == (row, more, worse)


def test_one_point_is_no_frontier() -> None:
    """Fewer than two points, and costs that are no numbers, are mistakes."""
    group, gain, cost = program(0)
    with pytest.raises(MpqError, match="two points or more"):
        frontier(group, gain, cost, 1)
    with pytest.raises(MpqError, match="no number"):
        frontier(group, gain, cost * np.nan, 5)
