"""How many configurations one timing task should measure: a model of a campaign on a cluster, and the choice it leads to.

A task costs more than its measurements: the runner's own work, and the building of the model that is timed. Few long tasks waste
little of that but leave devices idle at the end, and where there are many devices the scheduler can no longer hand out short
tasks fast enough. How measurements are spread over tasks decides the time of a campaign and nothing else: each is stored under
a key of its own.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

SHARE = 0.05  # of a device's time that may go to what is not measuring, where configurations suffice to keep it low


@dataclass(frozen=True)
class TaskCost:
    """Seconds that a timing task takes on its device: `task_s` of the runner, `build_s` for the model, `configuration_s` each.

    `tasks_per_s` is what the busiest of the processes can do that there is one of (flow, scheduler, Prefect's server), however
    many devices there are. The runner's figures are CPU seconds measured with Dask on a Xeon (`make bench-fanout`).
    """

    build_s: float
    configuration_s: float
    task_s: float = 0.13
    tasks_per_s: float = 20.0

    def seconds(self, configurations: float) -> float:
        """One task."""
        return self.task_s + self.build_s + configurations * self.configuration_s


def seconds_of(repeats: int, ttft_s: float) -> float:
    """Seconds that one configuration takes: `repeats` runs, a quarter of a base's beside each, and a run that is not timed."""
    return (1.25 * repeats + 1) * ttft_s


def slice_size(configurations: int, devices: int, cost: TaskCost, share: float = SHARE) -> int:
    """Configurations per task for a campaign of `configurations` on `devices`, so that its time is short for certain.

    It takes the size with the smallest bound on that time (see bound_s), among those long enough for the overhead to stay
    under `share` of a task. Where there are too few configurations for both, no device goes without work: a device that
    waits saves nothing.
    """
    full = math.ceil(configurations / devices)
    lasting = math.ceil((cost.task_s + cost.build_s) * (1 - share) / (share * cost.configuration_s))
    return min(
        range(min(lasting, full), configurations + 1),
        key=lambda size: bound_s(configurations, devices, size, cost),
    )


def bound_s(configurations: int, devices: int, size: int, cost: TaskCost) -> float:
    """Seconds that a campaign takes at most if its tasks take what they should.

    Until the last task is handed out, either the scheduler is handing one out or no device waits for one; and then that task
    takes its time. (Graham's bound for list scheduling, 1969, with the scheduler as one more machine.)
    """
    tasks, task = math.ceil(configurations / size), cost.seconds(size)
    return tasks / cost.tasks_per_s + tasks * task / devices + (1 - 1 / devices) * task


@dataclass(frozen=True)
class Campaign:
    """A simulated campaign: its `seconds`, the share of all devices' time spent measuring, the scheduler's share of time at work."""

    seconds: float
    measuring: float
    scheduler: float


def simulate(
    configurations: int, devices: int, size: int, cost: TaskCost, spread: float = 0.0, seed: int = 0
) -> Campaign:
    """Run a campaign event by event: a device that is free asks for a task, one process hands them out in turn.

    Configurations take cost.configuration_s in the mean, log-normally spread with this standard deviation of the logarithm.
    """
    rng, hand_s = random.Random(seed), 1 / cost.tasks_per_s
    # when each device is without work
    free = [0.0] * min(devices, math.ceil(configurations / size))
    handed, measured_s, tasks = 0.0, 0.0, 0
    for at in range(0, configurations, size):
        handed = max(handed, free[0]) + hand_s
        n = min(size, configurations - at)
        drawn = (rng.lognormvariate(-(spread**2) / 2, spread) for _ in range(n))
        work = cost.configuration_s * (sum(drawn) if spread else n)
        heapq.heapreplace(free, handed + cost.seconds(0) + work)
        measured_s, tasks = measured_s + work, tasks + 1
    end = max(free)
    return Campaign(end, measured_s / (devices * end), tasks * hand_s / end)
