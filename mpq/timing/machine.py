"""What a machine was doing beside what was timed on it: time that its hypervisor or other processes took, and its clock.

Read from Linux; elsewhere nothing is known, and nothing is held against a measurement. Readings only: no setting is touched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STOLEN = 0.10  # a pair is disturbed when the hypervisor took this share of the cores' time,
WAITED = 0.10  # or this process's threads together stood in the queue for a core for this share of the time,
SLOW_CLOCK = 0.95  # or the fastest core's clock was under this share of its median


@dataclass(frozen=True)
class Reading:
    """Counters at one moment: clock ticks of all cores since the start and those of them stolen by the hypervisor; the seconds that
    this process's threads could have run and waited for a core, summed over them; the fastest core's clock (idle ones may rest), NaN where unknown."""

    ticks: int
    stolen: int
    waited_s: float
    clock_mhz: float


@dataclass(frozen=True)
class Interval:
    """What happened between two readings: shares of the time, and the fastest core's clock (MHz; NaN where unknown)."""

    steal_share: float
    waited_share: float
    clock_mhz: float


def reading(proc: Path = Path("/proc"), cpus: Path = Path("/sys/devices/system/cpu")) -> Reading:
    """The machine now; zeros for what it does not tell. Sources: proc(5) for stat, sched-stats of Linux for a task's schedstat."""
    try:
        fields = [int(field) for field in (proc / "stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        fields = []
    waited_ns = 0
    for task in _entries(proc / "self" / "task"):
        try:
            waited_ns += int((task / "schedstat").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            continue  # the thread has ended, or the kernel keeps no such statistics
    clocks = []
    for cpu in _entries(cpus, "cpu[0-9]*"):
        try:
            clocks.append(int((cpu / "cpufreq" / "scaling_cur_freq").read_text()) / 1e3)
        except (OSError, ValueError):  # virtual machines have none
            continue
    return Reading(
        sum(fields),
        fields[7] if len(fields) > 7 else 0,
        waited_ns / 1e9,
        max(clocks) if clocks else np.nan,
    )


def between(first: Reading, last: Reading, seconds: float) -> Interval:
    """What happened in the `seconds` between two readings. A thread that ended takes its counter along: no less than 0."""
    return Interval(
        (last.stolen - first.stolen) / max(1, last.ticks - first.ticks),
        max(0.0, last.waited_s - first.waited_s) / max(seconds, 1e-9),
        float(np.mean([first.clock_mhz, last.clock_mhz])),
    )


def calm(intervals: Sequence[Interval], waiting: bool = True) -> np.ndarray:
    """For each interval, whether nobody else took the cores and their clock was as always.

    What most intervals show is how this machine is (more threads than cores, say), and is held against none. Without `waiting`
    the time that threads waited for a core counts for nothing: a clock that counts CPU seconds does not see it.
    """
    steal, waited, clock = (
        np.array([getattr(i, name) for i in intervals])
        for name in ("steal_share", "waited_share", "clock_mhz")
    )
    known = clock[np.isfinite(clock)]
    slow = clock < SLOW_CLOCK * (np.median(known) if len(known) else 0.0)  # NaN is below nothing
    undisturbed = np.ones(len(intervals), dtype=bool)
    for disturbed in (steal > STOLEN, waiting & (waited > WAITED), slow):
        if 2 * disturbed.sum() <= len(intervals):
            undisturbed &= ~disturbed
    return undisturbed


def load_average() -> float:
    """Processes that run or want to, averaged over the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _entries(folder: Path, pattern: str = "*") -> list[Path]:
    try:
        return list(folder.glob(pattern))
    except OSError:
        return []
