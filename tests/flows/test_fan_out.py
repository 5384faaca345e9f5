"""Dozens of timings on simulated accelerators of a real cluster of processes, one of them killed, one late; by Dask and by Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from bench.simulated import fan_out, intervals
from deployments.processes import Services
from mpq.flows import times
from mpq.spec import RunnerSpec, TimingSpec


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    """The processes of a cluster, ended with the test."""
    with Services(tmp_path / "services") as services:
        yield services


def overlaps(told: pl.DataFrame) -> int:
    """Pairs of neighbouring intervals of one process that overlap."""
    of = told.sort("pid", "start_s").with_columns(
        pl.col("start_s").shift(-1).over("pid").alias("next_s")
    )
    return of.filter(pl.col("next_s") < pl.col("end_s")).height


def strike_midway(begun: Path, strike: Callable[[], None], after: int) -> threading.Thread:
    """Call `strike` once so many tasks have begun."""

    def wait() -> None:
        deadline = time.monotonic() + 240
        while (
            begun.read_text().count("\n") if begun.exists() else 0
        ) < after and time.monotonic() < deadline:
            time.sleep(0.01)
        strike()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_engines_of_their_own_are_spread_over_all_devices() -> None:
    """Where each configuration begins an engine, no device is without; exchanged linears are measured in one task."""
    for compiled, size in ((True, 3), (False, 11)):
        spec = SimpleNamespace(timing=TimingSpec(engine="vllm", compile=compiled))
        run: Any = SimpleNamespace(place=SimpleNamespace(accelerators=4), spec=spec)
        assert times._slice(run, 11) == size


@pytest.mark.parametrize(
    ("kind", "tasks", "seconds"), [("dask", 40, 0.3), ("ray", 60, 1.0)]
)  # a node of Ray takes long to start
def test_timings_on_simulated_accelerators(
    kind: str, tasks: int, seconds: float, services: Services, tmp_path: Path
) -> None:
    """Accelerators are held by one task at a time, though workers have threads to spare; the killed worker's own measurement is
    begun again and no other, and the late one gets its part."""
    begun = tmp_path / "begun"
    if kind == "dask":
        address = services.dask(workers=2, threads=4)
        start, victim = services.dask_worker, "dask-1"
    else:
        pytest.importorskip("prefect_ray", reason="ray is not installed: pip install 'mpq[ray]'")
        address = services.ray(workers=2)
        start, victim = services.ray_worker, "ray-1"

    def strike() -> None:
        services.kill(victim)
        start(address, "late")

    striker = strike_midway(begun, strike, tasks // 4)
    outcome = fan_out(
        RunnerSpec(kind=kind, address=address),
        (tmp_path / "store").as_uri(),
        tasks,
        seconds,
        begun=str(begun),
    )
    striker.join()
    told = intervals(outcome)
    assert sorted(told["number"]) == list(range(tasks))
    assert overlaps(told) == 0
    times_begun = pl.Series(begun.read_text().split("\n")[:-1]).str.split(" ").list.first()
    assert tasks <= len(times_begun) <= tasks + 1, (
        "more was begun again than the one measurement that was cut off"
    )
    workers = told.group_by("pid").agg(pl.col("start_s").min(), pl.len()).sort("start_s")
    assert workers.height >= 3, "the worker that joined late got nothing"
