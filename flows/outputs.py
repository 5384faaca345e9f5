"""What a run leaves for people: local files, and artifacts in Prefect."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import polars.selectors as cs
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from mpq.errors import MpqError
from mpq.program.plan import Plan
from mpq.report.best import best_plan
from mpq.report.runs import join_tables, write_run
from mpq.spec import RunSpec
from mpq.store.entries import Store, TableRef

Tables = Mapping[str, Sequence[TableRef]]


def write_outputs(
    spec: RunSpec,
    plans: Sequence[dict[str, Any]],
    report: TableRef,
    tables: Tables,
    facts: Mapping[str, str],
) -> dict[str, str]:
    """Write plans, report and the run's record under the spec's `out`; returns their paths.

    `plan` among them is the plan to run, by what was measured (report.best). Which model and text
    plans belong to is added here: it is true of this run, not of the content. Plans that a run
    under an earlier spec left are removed. Raises MpqError where the folder cannot be written.
    """
    out = Path(spec.out) / spec.name
    text = spec.evaluation or spec.calibration
    belongs = {
        "model": spec.model.path,
        "folder": str(Path.cwd()),  # from which relative paths lead
        "revision": spec.model.revision,
        "evaluation": text.source,
        "text": text.model_dump(include={"field", "split", "seed", "revision"}),
        "prefill": [spec.timing.batch, spec.timing.length],
    }
    made = [replace(Plan(**p), provenance={**p["provenance"], **belongs}) for p in plans]
    best = best_plan(join_tables(tables))
    try:
        (out / "plans").mkdir(parents=True, exist_ok=True)
        _remove_plans(out / "plans")
        for plan in made:
            (out / "plans" / f"{plan.name}.json").write_text(plan.to_json(), encoding="utf-8")
        (out / "report.html").write_bytes(Store(report.store).read_bytes(report))
        write_run(out, spec.name, facts, tables)
    except OSError as error:
        raise MpqError(
            f"The output folder {out} cannot be written ({error}): set `out` in the spec to a "
            "folder of yours."
        ) from None
    chosen = best.outline.plan if best else made[-1].name
    return {
        "report": str(out / "report.html"),
        "plans": str(out / "plans"),
        "plan": str(out / "plans" / f"{chosen}.json"),
    }


def _remove_plans(folder: Path) -> None:
    """Remove the plans that an earlier run wrote: those that carry a run's provenance and are
    called as a run calls them. What people put there stays."""
    for path in folder.glob("*.json"):
        try:
            plan = Plan.from_json(path.read_text(encoding="utf-8"))
        except (MpqError, UnicodeDecodeError):
            continue
        if plan.name == path.stem and {"gains", "model"} <= set(plan.provenance):
            path.unlink()


def publish(
    spec: RunSpec, tables: Tables, drawn: Mapping[str, TableRef], out: Mapping[str, str]
) -> None:
    """Artifacts for Prefect's UI: tables, the frontier as a picture, links to report and plan.

    `drawn` has the `report` and the `frontier` in the store.
    """
    from mpq.report.results import results_table

    frames = join_tables(tables)
    shown = {
        "results": (results_table(frames), "Predicted and measured"),
        "groups": (frames["groups"], "Sequential groups"),
        "solutions": (frames["solutions"], "Solutions of the program"),
        "evaluation": (frames.get("evaluation"), "Measured under each plan"),
    }
    for key, (frame, what) in shown.items():
        if frame is not None:
            create_table_artifact(
                rows_for_people(frame), key=key, description=f"{what}: {spec.name}"
            )
    frontier = drawn["frontier"]
    picture = base64.b64encode(Store(frontier.store).read_bytes(frontier)).decode()
    create_markdown_artifact(
        f"![frontier](data:image/png;base64,{picture})",
        key="frontier",
        description=f"Frontier: {spec.name}",
    )
    for key, stored in (("report", f"; in the store: {drawn['report'].uri}"), ("plan", "")):
        path, what = Path(out[key]).absolute(), f"{key.capitalize()}: {spec.name}{stored}"
        create_link_artifact(path.as_uri(), str(path), key=key, description=what)


def rows_for_people(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table with four significant digits."""
    rounded = frame.with_columns(cs.float().round_sig_figs(4))
    rows: list[dict[str, Any]] = json.loads(rounded.write_json())
    return rows
