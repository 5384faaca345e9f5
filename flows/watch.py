"""New checkpoints: found by content, calibrated once each, and compared with the one before of their architecture."""

from __future__ import annotations

from typing import Annotated, Any

import polars as pl
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from mpq.errors import MpqError
from mpq.flows.calibrate import aimed_at, calibrate
from mpq.flows.outputs import rows_for_people
from mpq.flows.recorded import flow
from mpq.flows.records import Claim, Records
from mpq.flows.run import one_by_one
from mpq.models.discovery import settled
from mpq.program.changes import Change, compare
from mpq.program.plan import Plan
from mpq.redaction import redact
from mpq.spec import RunSpec
from mpq.store.entries import Store, TableRef
from mpq.tasks.stage import read_json
from mpq.urls import UrlParameter

Urls = Annotated[
    list[UrlParameter],
    Field(min_length=1, description="Folders, fsspec URLs or hub ids to look for checkpoints in"),
]
Settle = Annotated[
    float, Field(ge=0, description="Seconds over which a checkpoint's files must not change")
]
Lease = Annotated[
    float,
    Field(ge=5, description="Seconds after which a run that says nothing any more counts as dead"),
]


@flow(
    name="watch",
    flow_run_name="watch {spec.name}",
    task_runner=one_by_one,
)
def watch(
    urls: Urls, spec: RunSpec, settle_s: Settle = 5.0, lease_s: Lease = 120.0
) -> list[dict[str, Any]]:
    """Calibrate each checkpoint under `urls` that is new by content, once; tell what its plans changed.

    What is done is recorded in the store, so neither a restart nor another watch beside this one does it again, and a
    copy under another name is known. A checkpoint that fails does not keep the others from being calibrated: the run
    fails after them, and the next one tries again.

    Args:
        urls: Folders, fsspec URLs or hub ids to look for checkpoints in.
        spec: How to calibrate; its model's path is replaced by each checkpoint's.
        settle_s: Seconds over which a checkpoint's files must not change: one that is being written waits.
        lease_s: Seconds after which a run that says nothing any more counts as dead.
    """
    log = get_run_logger()
    Store(spec.store).check()
    whole, growing = settled(urls, settle_s)
    outcome: list[dict[str, Any]] = [
        {"checkpoint": f.path, "status": "still being written"} for f in growing
    ]
    failures = []
    for found in whole:
        try:
            outcome.append(_one(found.path, spec, lease_s))
        except Exception as error:  # the others are not to wait for this one to be mended
            failures.append(f"{found.path}: {redact(str(error))}")
            outcome.append({"checkpoint": found.path, "status": f"failed: {redact(str(error))}"})
        log.info("%s: %s", found.path, outcome[-1]["status"])
    columns = ("checkpoint", "status", "name", "fingerprint", "compared_with")
    rows = [{c: row.get(c, "") for c in columns} for row in outcome]
    create_table_artifact(rows, key="checkpoints", description=f"Checkpoints watched: {spec.name}")
    if failures:
        raise MpqError(
            f"{len(failures)} of {len(whole)} checkpoints failed: {' | '.join(failures)}"
        )
    return outcome


def _one(path: str, spec: RunSpec, lease_s: float) -> dict[str, Any]:
    """Calibrate one checkpoint unless its content is known; returns what became of it."""
    from mpq.models.checkpoint import fetch, fingerprint

    content = fingerprint(fetch(path, spec.model.revision if path == spec.model.path else None))
    records = Records(spec)
    told = {"checkpoint": path, "fingerprint": content}
    if done := records.done(content):
        return {**told, "status": "known", "name": done["name"]}
    with Claim(spec.store, records.key(content), str(flow_run.id), lease_s) as claim:
        if not claim.held:
            return {**told, "status": "in progress in another run"}
        if done := records.done(content):  # the other run ended in between
            return {**told, "status": "known", "name": done["name"]}
        aimed = aimed_at(spec, path)
        aimed = aimed.model_copy(update={"name": f"{aimed.name}-{content[:8]}"})
        result = calibrate(aimed)
        if result["fingerprint"] != content:  # else another content would count as done
            raise MpqError(
                f"{path} changed while it was calibrated: the next run takes it up again."
            )
        previous, changes = records.latest(result["architecture"]), list[Change]()
        if previous:
            changes = compare(_plans(previous["plans"]), _plans(result["plan_files"]))
            publish_changes(changes, f"{previous['name']} → {aimed.name}")
        records.write(content, result["architecture"], aimed.name, path, result["plan_files"])
    return {
        **told,
        "status": "calibrated",
        "name": aimed.name,
        "out": result["out"],
        "stages": result["stages"],
        "compared_with": previous["name"] if previous else "",
        "changes": [c.row() for c in changes],
    }


def _plans(references: list[TableRef]) -> list[Plan]:
    return [Plan(**data) for ref in references for data in read_json(ref)]


def publish_changes(changes: list[Change], title: str) -> None:
    """The changes as a table artifact, and the ops that moved as lines of the log."""
    log = get_run_logger()
    create_table_artifact(
        rows_for_people(pl.DataFrame([c.row() for c in changes])),
        key="changes",
        description=f"What changed: {title}",
    )
    for change in changes:
        if change.strategy.startswith("ip_"):
            log.info(
                "%s τ=%g: %d ops moved, gain %+.4g, predicted loss MSE %+.4g",
                change.strategy,
                change.tau,
                len(change.moved),
                change.gain_after - change.gain_before,
                change.loss_mse_after - change.loss_mse_before,
            )
