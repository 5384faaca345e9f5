"""Measured time: the configurations of one signature, and whole plans, each with base interleaved on the same device."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import polars as pl

from mpq.spec import TimingSpec
from mpq.store.entries import TableRef
from mpq.tasks.checkpoint import at_hand
from mpq.tasks.device import check_device, exclusive
from mpq.tasks.progress import tracked
from mpq.tasks.stage import Output, batch, read, stage


def _random_model(folder: str, base: str) -> Any:
    """The architecture with random weights: time does not depend on them, and a new checkpoint re-uses every measurement."""
    from mpq.models.checkpoint import load_config
    from mpq.timing.measure import timing_model

    return timing_model(load_config(at_hand(folder)), base)


@batch("measurement", retries=1)
def time_configurations(
    folder: str,
    base: str,
    device: str,
    groups: TableRef,
    wanted: dict[str, tuple[str, tuple[str, ...]]],
    spec: TimingSpec,
    made_on: str,
    missing: Callable[[str], bool],
) -> Iterator[tuple[str, pl.DataFrame]]:
    """A row of the timing table for each (signature, configuration) wanted, under its key."""
    from mpq.timing.measure import measure_each

    check_device(device, made_on, spec.threads_on(device))
    with (
        exclusive(device),
        tracked("timing " + ", ".join(dict.fromkeys(s for s, _ in wanted.values()))) as progress,
    ):
        if not (open_ := [key for key in wanted if missing(key)]):
            return
        model = _random_model(folder, base).to(device)
        rows = measure_each(
            model,
            read(groups),
            [(s, [c]) for s, c in map(wanted.__getitem__, open_)],
            base=base,
            batch=spec.batch,
            length=spec.length,
            repeats=spec.repeats,
            method=spec.method,
            seed=spec.seed,
            target=spec.target,
            cap=spec.cap,
            compiled=spec.compile,
            graph=spec.graph,
            threads=spec.threads,
            clock=spec.clock,
            wanted=lambda place: missing(open_[place]),
        )
        for done, (place, row) in enumerate(rows, 1):
            yield open_[place], row
            progress(done, len(open_))


@stage("timing")
def merge_measurements(groups: TableRef, measurements: list[TableRef]) -> Output:
    """The timing table of what was measured one by one."""
    return {"timing": pl.concat([read(m) for m in measurements], how="diagonal_relaxed")}


@stage("probe", retries=1)
def probe(folder: str, base: str, device: str, spec: TimingSpec, made_on: str) -> Output:
    """Seconds to build the model to be timed, and its TTFT in base: what slices are cut by."""
    from mpq.timing.measure import base_ttft

    check_device(device, made_on, spec.threads_on(device))
    with exclusive(device):
        start = time.perf_counter()
        model = _random_model(folder, base).to(device)
        build_s = time.perf_counter() - start
        told = {
            "build_s": build_s,
            "ttft_s": base_ttft(
                model, base, spec.batch, spec.length, threads=spec.threads, clock=spec.clock
            ),
        }
    return {"probe": (json.dumps(told).encode(), "json")}


@stage("plan_ttft", retries=1)
def time_plans(
    folder: str,
    base: str,
    device: str,
    groups: TableRef,
    plans: list[dict[str, str]],
    repeats: int,
    spec: TimingSpec,
    made_on: str,
) -> Output:
    """TTFT of whole plans beside base; a row a plan, in the order given."""
    from mpq.timing.measure import measure_ttft

    check_device(device, made_on, spec.threads_on(device))
    with exclusive(device), tracked("TTFT of the plans") as progress:
        model = _random_model(folder, base).to(device)
        frame = measure_ttft(
            model,
            plans,
            base=base,
            batch=spec.batch,
            length=spec.length,
            groups=read(groups),
            repeats=repeats,
            seed=spec.seed,
            target=spec.target,
            cap=spec.cap,
            compiled=spec.compile,
            graph=spec.graph,
            threads=spec.threads,
            clock=spec.clock,
            progress=progress,
        )
    return {"plan_ttft": frame.with_columns(pl.Series("plan", range(len(plans)), dtype=pl.Int64))}
