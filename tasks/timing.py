"""Measured time: the configurations of one signature, and whole plans, each with base interleaved on the same device."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import polars as pl

from mpq.spec import TimingSpec
from mpq.store.code import code_version
from mpq.store.entries import TableRef, content_key
from mpq.tasks.checkpoint import Architecture, with_random_weights
from mpq.tasks.device import check_device, exclusive
from mpq.tasks.progress import tracked
from mpq.tasks.stage import Output, batch, content_of, read, read_together, stage

Wanted = tuple[str, tuple[str, ...]]  # signature, configuration
# how the work is spread, what is measured of all there is, what the plans make of it: no time depends on them
_NOT_MEASURED = {"slice", "bound", "limit", "rounds"}


def made_with(device: str, device_name: str) -> tuple[str, ...]:
    """What a time depends on besides the model: the kind of device, libraries, and the code of the kernels there."""
    kernels = code_version(f"mpq.kernels.{device.partition(':')[0]}")
    return device_name, version("torch"), version("transformers"), kernels


@batch("measurement", name="timing: measure", retries=1)
def time_configurations(
    architecture: Architecture,
    groups: TableRef,
    wanted: dict[str, Wanted],
    spec: TimingSpec,
    missing: Callable[[str], bool],
) -> Iterator[tuple[str, pl.DataFrame]]:
    """A row of the timing table for each (signature, configuration) wanted, under its key."""
    from mpq.timing.measure import measure_each

    check_device(architecture.device, architecture.device_name)
    label = "timing " + ", ".join(dict.fromkeys(s for s, _ in wanted.values()))
    with exclusive(architecture.device), tracked(label) as progress:
        if not (left := [key for key in wanted if missing(key)]):
            return
        rows = measure_each(
            with_random_weights(architecture),
            read(groups),
            [(signature, [configuration]) for signature, configuration in map(wanted.get, left)],  # type: ignore[misc]
            base=architecture.base,
            wanted=lambda place: missing(left[place]),
            method=spec.method,
            **_how(spec),
            repeats=spec.repeats,
        )
        for done, (place, row) in enumerate(rows, 1):
            yield left[place], row
            progress(done, len(left))


def measurement_keys(
    architecture: Architecture, groups: TableRef, wanted: list[Wanted], spec: TimingSpec
) -> dict[str, Wanted]:
    """The key under which each configuration's time is kept.

    It holds the whole architecture, not the signature's shapes alone: a row carries the model's own TTFT.
    """
    measured = spec.model_dump(mode="json", exclude=_NOT_MEASURED)
    same = content_of((architecture, groups)), measured, code_version(time_configurations.compute)
    return {content_key(*same, signature, c): (signature, c) for signature, c in wanted}


def _how(spec: TimingSpec) -> dict[str, Any]:
    fields = {"batch", "length", "seed", "target", "cap", "graph"}
    return {**spec.model_dump(include=fields), "compiled": spec.compile}


@stage("timing", key=lambda keys, **_: keys, name="timing")
def merge_measurements(keys: list[str], measurements: list[TableRef], groups: TableRef) -> Output:
    """The timing table of what was measured one by one, under `keys`."""
    return {"timing": read_together(measurements)}


@stage("probe", on="accelerator", retries=1)
def probe(architecture: Architecture, spec: TimingSpec) -> Output:
    """Seconds to build the model to be timed, and its TTFT in base: what slices are cut by."""
    from mpq.timing.measure import base_ttft

    check_device(architecture.device, architecture.device_name)
    with exclusive(architecture.device):
        start = time.perf_counter()
        model = with_random_weights(architecture)
        build_s = time.perf_counter() - start
        ttft_s = base_ttft(model, architecture.base, spec.batch, spec.length)
    return {"probe": (json.dumps({"build_s": build_s, "ttft_s": ttft_s}).encode(), "json")}


def _plans_alone(spec: TimingSpec, **inputs: Any) -> Any:
    """Without what only the configurations' times depend on."""
    return inputs, spec.model_dump(mode="json", exclude=_NOT_MEASURED | {"repeats", "method"})


@stage("plan_ttft", on="accelerator", key=_plans_alone, retries=1)
def time_plans(
    architecture: Architecture,
    groups: TableRef,
    plans: list[dict[str, str]],
    repeats: int,
    spec: TimingSpec,
    purpose: str,
) -> Output:
    """TTFT of whole plans (op → format) beside base; a row a plan, in the order given.

    Kept without weights, so a fine-tune re-uses it, but for each `purpose` apart: what a prediction rests on is not what it is
    held against.
    """
    from mpq.timing.measure import measure_ttft

    check_device(architecture.device, architecture.device_name)
    with exclusive(architecture.device), tracked(purpose) as progress:
        frame = measure_ttft(
            with_random_weights(architecture),
            plans,
            base=architecture.base,
            groups=read(groups),
            progress=progress,
            **_how(spec),
            repeats=repeats,
        )
    return {"plan_ttft": frame.with_columns(pl.Series("plan", range(len(plans)), dtype=pl.Int64))}
