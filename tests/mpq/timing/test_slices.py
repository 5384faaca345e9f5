"""How measurements are spread over tasks: a simulated campaign, its bound, and the choice of slices."""

from __future__ import annotations

import itertools
import math

import pytest

from mpq.timing.slices import SHARE, TaskCost, bound_s, simulate, slice_size

CASES = list(itertools.product((1, 5, 82, 642, 20_000), (1, 2, 8, 64, 1000)))
QUICK, SLOW = TaskCost(0.3, 0.5, 0.06, 40.0), TaskCost(20.0, 4.0, 0.06, 40.0)


def test_a_campaign_by_hand() -> None:
    """Five configurations of 2 s on two devices, handed out in 1 s each: worked out with pencil and paper."""
    cost = TaskCost(build_s=0.5, configuration_s=2.0, task_s=0.5, tasks_per_s=1.0)
    # handed 1, 2, 5 (free at 4), 6 (free at 5), 9 (free at 8); each takes 3
    campaign = simulate(5, 2, 1, cost)
    assert campaign.seconds == 12
    assert campaign.measuring == pytest.approx(10 / 24)
    assert campaign.scheduler == pytest.approx(5 / 12)
    assert simulate(5, 2, 5, cost).seconds == 1 + 1 + 10


@pytest.mark.parametrize(("configurations", "devices"), CASES)
def test_the_bound_holds(configurations: int, devices: int) -> None:
    """No simulated campaign takes longer than its bound, whatever the slices."""
    for size in {1, 7, slice_size(configurations, devices, QUICK), configurations}:
        for cost in (QUICK, SLOW):
            whole = -(-configurations // size) * size  # the bound takes every task for a full one
            assert simulate(whole, devices, size, cost).seconds <= bound_s(
                configurations, devices, size, cost
            ) * (1 + 1e-9)


@pytest.mark.parametrize(("configurations", "devices"), CASES)
@pytest.mark.parametrize("cost", [QUICK, SLOW], ids=["quick", "slow"])
def test_devices_are_filled_and_overhead_stays_small(
    configurations: int, devices: int, cost: TaskCost
) -> None:
    """Overhead is under its share of each task; if not, there are just enough tasks for every device to have one."""
    size = slice_size(configurations, devices, cost)
    assert 1 <= size <= configurations
    overhead = cost.seconds(0) / cost.seconds(size)
    assert overhead <= SHARE or size >= math.ceil(configurations / devices)


def test_one_device_gets_one_task() -> None:
    """There is nothing to spread."""
    assert slice_size(82, 1, QUICK) == 82


@pytest.mark.parametrize(
    ("configurations", "devices"),
    [(642, 8), (642, 64), (5_000, 64), (5_000, 1000), (100_000, 1000)],
)
@pytest.mark.parametrize("build_s", [0.0, 2.0])
def test_the_choice_is_near_the_best(configurations: int, devices: int, build_s: float) -> None:
    """Simulated with times that vary, the chosen slices take at most a fifth longer than the best ones of all sizes."""
    cost = TaskCost(build_s, 2.0, 0.06, 40.0)
    sizes = {max(1, round(1.3**k)) for k in range(60) if 1.3**k <= configurations}
    best = min(simulate(configurations, devices, size, cost, spread=0.3).seconds for size in sizes)
    chosen = slice_size(configurations, devices, cost)
    assert simulate(configurations, devices, chosen, cost, spread=0.3).seconds <= 1.2 * best


def test_where_the_scheduler_bounds_a_campaign() -> None:
    """A thousand devices and short tasks: one configuration a task leaves devices waiting for work, the chosen slices do not."""
    cost = TaskCost(0.0, 2.0, 0.06, 40.0)
    short = simulate(50_000, 1000, 1, cost)
    chosen = simulate(50_000, 1000, slice_size(50_000, 1000, cost), cost)
    assert short.scheduler > 0.99
    assert short.measuring < 0.15
    assert chosen.measuring > 0.6
    assert chosen.seconds < short.seconds / 4
