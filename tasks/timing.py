"""Measured time: the configurations of one signature, and whole plans, each with base interleaved on the same device."""

from __future__ import annotations

from typing import Any

import polars as pl

from mpq.spec import TimingSpec
from mpq.store import TableRef
from tasks.checkpoint import at_hand
from tasks.device import check_device, exclusive
from tasks.progress import tracked
from tasks.stage import Output, read, stage


def _random_model(folder: str, base: str) -> Any:
    """The architecture with random weights: time does not depend on them, and a new checkpoint re-uses every measurement."""
    from mpq.model import load_config
    from mpq.timing import timing_model

    return timing_model(load_config(at_hand(folder)), base)


@stage("timing", retries=1)
def time_configurations(
    folder: str,
    base: str,
    device: str,
    groups: TableRef,
    signature: str,
    configurations: list[list[str]],
    spec: TimingSpec,
    made_on: str,
) -> Output:
    """Time gains of some configurations of one signature."""
    from mpq.timing import measure

    check_device(device, made_on)
    with exclusive(device), tracked(f"timing {signature.rpartition('-')[0] or signature}") as progress:
        model = _random_model(folder, base).to(device)
        requests = [(signature, [tuple(c) for c in configurations])]
        return {
            "timing": measure(
                model, read(groups), requests, base=base, batch=spec.batch, length=spec.length,
                repeats=spec.repeats, method=spec.method, seed=spec.seed, target=spec.target, cap=spec.cap,
                compiled=spec.compile, graph=spec.graph, progress=progress,
            )
        }  # fmt: skip


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
    from mpq.timing import measure_ttft

    check_device(device, made_on)
    with exclusive(device), tracked("TTFT of the plans") as progress:
        model = _random_model(folder, base).to(device)
        frame = measure_ttft(
            model, plans, base=base, batch=spec.batch, length=spec.length, groups=read(groups), repeats=repeats, seed=spec.seed, compiled=spec.compile,
            graph=spec.graph, progress=progress,
        )  # fmt: skip
    return {"plan_ttft": frame.with_columns(pl.Series("plan", range(len(plans)), dtype=pl.Int64))}
