"""Timing tasks on a simulated accelerator: they take it as real ones do, sleep for as long as a measurement would, and say when.

In a module of its own, which a cluster's workers import: the tests and bench/fanout.py use it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import polars as pl
from prefect import flow

from mpq.flows import calibrate
from mpq.flows.run import one_by_one, running
from mpq.spec import RunnerSpec, RunSpec, parse_spec
from mpq.store.entries import content_key
from mpq.tasks.stage import On, batch, read


@batch("interval", name="fan out")
def occupy(
    wanted: dict[str, int], seconds: float, begun: str, missing: Callable[[str], bool]
) -> Iterator[tuple[str, pl.DataFrame]]:
    """For each number wanted, when it began and ended on this process's accelerator (system-wide monotonic clock, s)."""
    for key, number in wanted.items():
        if not missing(key):
            continue
        if begun:
            with open(
                begun, "a", encoding="utf-8"
            ) as file:  # one small write: whole lines, whoever else appends
                file.write(f"{number} {os.getpid()}\n")
        start = time.monotonic()
        time.sleep(seconds)
        yield (
            key,
            pl.DataFrame(
                {"number": number, "pid": os.getpid(), "start_s": start, "end_s": time.monotonic()}
            ),
        )


@flow(name="fan out", task_runner=one_by_one)
def fan_out(
    runner: RunnerSpec,
    store: str,
    tasks: int,
    seconds: float = 0.0,
    size: int = 1,
    begun: str = "",
    on: On = "accelerator",
) -> dict[str, Any]:
    """Run `tasks` tasks of `size` measurements each; returns the intervals, the stages' accounts and the seconds to submit."""
    from_nowhere = parse_spec(
        {
            "model": {"path": "none/none", "base": "fp32"},
            "calibration": {"source": "none"},
            "objectives": {"et": {"formats": ["bf16"]}},
            "store": store,
            "runner": runner.model_dump(),
        }
    )
    with running(from_nowhere) as run:
        calls = {
            f"task {t}": {
                "wanted": {content_key("interval", n): n for n in range(t * size, (t + 1) * size)},
                "seconds": seconds,
                "begun": begun,
            }
            for t in range(tasks)
        }
        start = time.perf_counter()
        done = run.map(replace(occupy, on=on), calls)
        took = time.perf_counter() - start
    return {
        "intervals": [ref for references in done for ref in references.values()],
        "stages": run.done,
        "seconds": took,
    }


def intervals(outcome: dict[str, Any]) -> pl.DataFrame:
    """What the tasks told: number, pid, start_s, end_s."""
    return pl.concat([read(ref) for ref in outcome["intervals"]])


@flow(name="sensitivity", task_runner=one_by_one)
def sensitivity(spec: RunSpec) -> float:
    """Seconds of the sensitivity stage of a run."""
    with running(spec, timing=False) as run:
        calibrate.sensitivity(run, calibrate.partition(run), calibrate.load(run)["calibration"])
    return next(seconds for name, _, _, seconds in run.done if name == "sensitivity")
