"""What is read of a machine beside a timing, on this one and from files such as Linux shows."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpq.timing.machine import Interval, Reading, between, calm, reading


def interval(steal: float = 0.0, waited: float = 0.0, clock: float = math.nan) -> Interval:
    return Interval(steal, waited, clock)


def test_time_taken_by_others_and_a_slow_clock_are_no_calm() -> None:
    """A tenth stolen or waited is the limit; a clock counts where it is known, against its median."""
    assert calm(
        [interval(), interval(steal=0.2), interval(waited=0.2), interval(steal=0.05, waited=0.05)]
    ).tolist() == [
        True,
        False,
        False,
        True,
    ]
    assert calm(
        [interval(clock=c) for c in (3000.0, 2990.0, 2400.0, 3010.0, math.nan)]
    ).tolist() == [
        True,
        True,
        False,
        True,
        True,
    ]


def test_what_a_machine_always_shows_is_no_disturbance() -> None:
    """Threads that always wait (more of them than cores) disturb no pair; stolen time beside that still does."""
    always = [interval(waited=0.5) for _ in range(5)]
    assert calm(always).all()
    assert calm([*always, interval(steal=0.3, waited=0.5)]).tolist() == [True] * 5 + [False]


def test_an_interval_is_the_difference_of_two_readings() -> None:
    """Shares of all cores' ticks and of the seconds between; threads that ended make nothing negative."""
    first, last = Reading(1000, 10, 5.0, 3000.0), Reading(1200, 30, 5.5, 2000.0)
    assert between(first, last, 2.0) == Interval(0.1, 0.25, 2500.0)
    assert between(last, last, 0.0) == Interval(0.0, 0.0, 2000.0)
    assert between(first, Reading(1200, 30, 4.0, 3000.0), 2.0).waited_share == 0.0


def test_files_as_linux_has_them(tmp_path: Path) -> None:
    """stat's first line, every thread's schedstat, each core's clock; what is missing or damaged counts for nothing."""
    proc, cpus = tmp_path / "proc", tmp_path / "cpu"
    for task, waited in (("11", "2500000000"), ("12", "500000000")):
        (proc / "self" / "task" / task).mkdir(parents=True)
        (proc / "self" / "task" / task / "schedstat").write_text(f"190868 {waited} 2\n")
    (proc / "self" / "task" / "13").mkdir()
    (proc / "stat").write_text("cpu  100 0 50 800 5 0 10 35 0 0\ncpu0 1 1 1\n")
    for core, khz in ((0, "2400000\n"), (1, "3000000\n")):
        (cpus / f"cpu{core}" / "cpufreq").mkdir(parents=True)
        (cpus / f"cpu{core}" / "cpufreq" / "scaling_cur_freq").write_text(khz)
    (cpus / "cpu2").mkdir()
    (cpus / "cpufreq").mkdir()
    assert reading(proc, cpus) == Reading(1000, 35, 3.0, 3000.0)
    (proc / "stat").write_text("nothing of the kind")
    nothing = reading(proc, tmp_path / "none")
    assert (nothing.ticks, nothing.stolen, math.isnan(nothing.clock_mhz)) == (0, 0, True)


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(),
    reason="this system has no Linux scheduler's statistics",
)
def test_others_on_the_cores_are_seen() -> None:
    """While twice as many processes spin as there are cores, this one waits for a core; alone it need not."""
    spin = "import time; end = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    others = [
        subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        time.sleep(1.0)
        first, start = reading(), time.monotonic()
        while time.monotonic() < start + 1.0:
            pass
        waited = between(first, reading(), time.monotonic() - start).waited_share
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert waited > 0.1
    assert calm([interval(), interval(waited=waited), interval()]).tolist() == [True, False, True]
