"""Times of an architecture on one kind of device, before there is a checkpoint: partition and timing alone."""

from __future__ import annotations

from typing import Annotated, Any

import polars as pl
from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from mpq.errors import MpqError
from mpq.flows.calibrate import Pipeline
from mpq.flows.place import placed
from mpq.flows.stages import Stages
from mpq.spec import CalibrationSpec, ModelSpec, RunnerSpec, TimingSpec, parse_spec
from mpq.store.entries import Store
from mpq.tasks.stage import read

Formats = Annotated[
    list[str], Field(min_length=1, description="Formats to time, of those native on the device")
]
Kind = Annotated[
    str | None,
    Field(description="Part of the device's name that must be there, such as H200 or EPYC"),
]
Where = Annotated[
    str,
    Field(description="fsspec URL of the tables: that of the runs which are to find these times"),
]


@flow(
    name="campaign",
    flow_run_name="campaign {model.path}",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]
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
    from mpq.kernels import check_native
    from mpq.models.checkpoint import load_config
    from mpq.models.partition import architecture_key

    # the text of a run is never read here, its spec wants one
    text = CalibrationSpec(source="none").model_dump()
    data = {
        "name": model.path,
        "model": model.model_dump(),
        "timing": timing.model_dump(),
        "runner": runner.model_dump(),
    }
    spec = parse_spec(
        {**data, "calibration": text, "objectives": {"et": {"formats": formats}}, "store": store},
        "campaign",
    )
    Store(store).check()
    with placed(runner, model.device) as place:
        run = Pipeline(spec, Stages(store, place, timeout_s=runner.timeout_s))
        if device_kind and device_kind.lower() not in run.device_name.lower():
            raise MpqError(
                f"The device is {run.device_name}, the campaign is for {device_kind}: run it on a worker that has one."
            )
        place.ask(check_native, spec.objectives["et"].formats, model.device)
        architecture = architecture_key(load_config(run.folder))
        groups = run.partition(architecture)
        timed = run.timing(groups, architecture)
    times = pl.concat([read(ref) for ref in timed], how="diagonal_relaxed")
    best = times.group_by("signature", maintain_order=True).agg(
        pl.len().alias("configurations"),
        pl.col("instances").first(),
        (pl.col("gain_s").max() * 1e3).alias("best_gain_ms"),
        (pl.col("base_ttft_s").median() * 1e3).alias("base_ttft_ms"),
    )
    create_table_artifact(
        best.to_dicts(), key="campaign", description=f"Times of {model.path} on {run.device_name}"
    )
    return {"groups": groups, "timing": timed, "device": run.device_name, "stages": run.stages.done}
