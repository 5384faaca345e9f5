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
from mpq.tasks.checkpoint import Architecture, at_hand, with_random_weights
from mpq.tasks.device import check_device, exclusive
from mpq.tasks.progress import tracked
from mpq.tasks.stage import Output, batch, content_of, read, read_together, stage

Wanted = tuple[str, tuple[str, ...]]  # signature, configuration
# how the work is spread, what is measured of all there is, what the plans make of it: no time depends on them
_NOT_MEASURED = {"slice", "bound", "limit", "rounds", "more"}


def made_with(device: str, device_name: str, engine: str = "torch") -> tuple[str, ...]:
    """What a time depends on besides the model: the kind of device, libraries, and the code of the kernels there.

    An engine's version is in the device's name.
    """
    if engine == "vllm":
        return device_name, code_version("mpq.serving.vllm_process")
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
    from mpq.timing.in_vllm import measure_each_in_vllm
    from mpq.timing.measure import measure_each

    _check_device(architecture, spec)
    label = "timing " + ", ".join(dict.fromkeys(s for s, _ in wanted.values()))
    with exclusive(architecture.device), tracked(label) as progress:
        if not (left := [key for key in wanted if missing(key)]):
            return
        requests = [(s, [c]) for s, c in map(wanted.__getitem__, left)]
        how: dict[str, Any] = {
            "base": architecture.base,
            "wanted": lambda place: missing(left[place]),
            "method": spec.method,
            "repeats": spec.repeats,
        }
        if spec.engine == "vllm":
            rows = measure_each_in_vllm(
                _config_json(architecture),
                read(groups),
                requests,
                **how,
                **_in_vllm(architecture, spec),
            )
        else:
            rows = measure_each(
                with_random_weights(architecture), read(groups), requests, **how, **_how(spec)
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


def _check_device(architecture: Architecture, spec: TimingSpec) -> None:
    threads = spec.threads_on(architecture.device)
    check_device(architecture.device, architecture.device_name, threads, spec.engine)


def _config_json(architecture: Architecture) -> dict[str, Any]:
    from mpq.models.layout import read_config

    return read_config(at_hand(architecture.source, trusted=architecture.trusted))


def _in_vllm(architecture: Architecture, spec: TimingSpec) -> dict[str, Any]:
    fields = {"batch", "length", "output", "seed", "target", "cap", "threads", "clock"}
    how = spec.model_dump(include=fields)
    return {**how, "device": architecture.device, "compiled": spec.compile}


def _how(spec: TimingSpec) -> dict[str, Any]:
    fields = {"batch", "length", "output", "seed", "target", "cap", "graph", "threads", "clock"}
    return {**spec.model_dump(include=fields), "compiled": spec.compile}


@stage("timing", key=lambda keys, **_: keys, name="timing")
def merge_measurements(keys: list[str], measurements: list[TableRef], groups: TableRef) -> Output:
    """The timing table of what was measured one by one, under `keys`."""
    return {"timing": read_together(measurements)}


@stage("probe", on="accelerator", retries=1)
def probe(architecture: Architecture, spec: TimingSpec) -> Output:
    """Seconds to build the model to be timed, and those of one run in base: what slices are cut by."""
    from mpq.timing.measure import base_ttft

    _check_device(architecture, spec)
    with exclusive(architecture.device):
        start = time.perf_counter()
        model = with_random_weights(architecture)
        build_s = time.perf_counter() - start
        ttft_s = base_ttft(
            model,
            architecture.base,
            spec.batch,
            spec.length,
            spec.output,
            threads=spec.threads,
            clock=spec.clock,
        )
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
    """Times of whole plans (op → format) beside base; a row a plan, in the order given.

    Kept without weights, so a fine-tune re-uses it, but for each `purpose` apart: what a prediction rests on is not what it is
    held against.
    """
    from mpq.timing.in_vllm import measure_ttft_in_vllm
    from mpq.timing.measure import measure_ttft

    _check_device(architecture, spec)
    with exclusive(architecture.device), tracked(purpose) as progress:
        how: dict[str, Any] = {"base": architecture.base, "progress": progress, "repeats": repeats}
        if spec.engine == "vllm":
            frame = measure_ttft_in_vllm(
                _config_json(architecture), plans, **how, **_in_vllm(architecture, spec)
            )
        else:
            frame = measure_ttft(
                with_random_weights(architecture), plans, groups=read(groups), **how, **_how(spec)
            )
    return {"plan_ttft": frame.with_columns(pl.Series("plan", range(len(plans)), dtype=pl.Int64))}
