"""Times of an architecture on one kind of device, before there is a checkpoint: partition and timing alone."""

from __future__ import annotations

from typing import Annotated, Any

import polars as pl
from prefect.artifacts import create_table_artifact
from pydantic import Field

from mpq.errors import MpqError
from mpq.flows.calibrate import check_formats, partition
from mpq.flows.recorded import flow
from mpq.flows.run import one_by_one, running
from mpq.flows.times import first_times
from mpq.spec import CalibrationSpec, ModelSpec, RunnerSpec, TimingSpec, parse_spec
from mpq.tasks.stage import read
from mpq.urls import UrlParameter

Formats = Annotated[
    list[str], Field(min_length=1, description="Formats to time, of those native on the device")
]
Kind = Annotated[
    str | None,
    Field(description="Part of the device's name that must be there, such as H200 or EPYC"),
]
Where = Annotated[
    UrlParameter,
    Field(description="fsspec URL of the tables: that of the runs which are to find these times"),
]


@flow(
    name="campaign",
    flow_run_name="campaign {model.path}",
    task_runner=one_by_one,
)
def campaign(
    model: ModelSpec,
    formats: Formats,
    timing: TimingSpec = TimingSpec(),
    store: Where = ".work/store",
    runner: RunnerSpec = RunnerSpec(),
    device_kind: Kind = None,
) -> dict[str, Any]:
    """Time every configuration of every signature of a configuration; a calibrate of the architecture finds them all.

    Returns the references of groups and timing, the device's name and the stages' accounts.

    Args:
        model: Folder, URL or hub id with a config.json (weights are not read), base format and device.
        formats: Formats to time.
        timing: Prefill and repeats, as in the specs that shall use the times.
        store: fsspec URL of the tables.
        runner: Where to time.
        device_kind: Part of the device's name that must be there.
    """
    data = {
        "name": "campaign",
        "model": model.model_dump(),
        # the text of a run is never read here, its spec wants one
        "calibration": CalibrationSpec(source="none").model_dump(),
        "objectives": {"et": {"formats": formats}},
        "timing": timing.model_dump(),
        "store": store,
        "runner": runner.model_dump(),
    }
    spec = parse_spec(data, "campaign")
    with running(spec) as run:
        device = run.architecture.device_name
        if device_kind and device_kind.lower() not in device.lower():
            raise MpqError(
                f"The device is {device}, the campaign is for {device_kind}: run it on a worker that has one."
            )
        check_formats(run)
        groups = partition(run)
        timed = first_times(run, groups)
    times = read(timed)
    best = times.group_by("signature", maintain_order=True).agg(
        pl.len().alias("configurations"),
        pl.col("instances").first(),
        (pl.col("gain_s").max() * 1e3).alias("best_gain_ms"),
        (pl.col("base_ttft_s").median() * 1e3).alias("base_ttft_ms"),
    )
    create_table_artifact(
        best.to_dicts(), key="campaign", description=f"Times of {model.path} on {device}"
    )
    return {"groups": groups, "timing": [timed], "device": device, "stages": run.done}
