"""What a run leaves in its folder: its own plans and no others, and which of them to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from synthetic import BASE, make_run, with_intervals

from mpq.flows.outputs import write_outputs
from mpq.program.plan import Plan, plan_name
from mpq.report.best import best_plan
from mpq.spec import parse_spec
from mpq.store.entries import Store

TABLES = with_intervals(make_run(layers=1, seeds=1))


def plans() -> list[dict[str, Any]]:
    """The plans of the run's solutions, as the stage that solves hands them on."""
    return [
        vars(
            Plan(
                row["strategy"],
                row["objective"],
                row["tau"],
                BASE,
                {"lm_head": "int8"},
                row["predicted_loss_mse"],
                row["budget"],
                row["predicted_gain"],
                6.25,
                row["seed"],
                provenance={"gains": "key"},
            )
        )
        for row in TABLES["solutions"].iter_rows(named=True)
    ]


def test_plans_of_an_earlier_spec_go(tmp_path: Path) -> None:
    """A second run leaves its own plans alone in the folder; what a person put there stays; `plan`
    is what was measured best."""
    store = Store((tmp_path / "store").as_uri())
    tables = {name: [store.write_table(name, "k", frame)] for name, frame in TABLES.items()}
    report = store.write_bytes("report", "k", b"<html>", "html")
    spec = parse_spec(
        {
            "name": "made-up",
            "model": {"path": "m", "base": BASE},
            "calibration": {"source": "text.txt"},
            "objectives": {"et": {"formats": ["int8"]}},
            "store": store.url,
            "out": str(tmp_path / "out"),
        }
    )
    folder = tmp_path / "out" / "made-up" / "plans"
    made = plans()
    write_outputs(spec, made, report, tables, {})
    (folder / "mine.json").write_text((folder / "et-ip_et-tau0.008.json").read_text())
    (folder / "notes.json").write_text("{}")
    fewer = [p for p in made if p["tau"] == 0.008]
    where = write_outputs(spec, fewer, report, tables, {})
    names = {plan_name(p["objective"], p["strategy"], p["tau"], p["seed"]) for p in fewer}
    assert {p.stem for p in folder.glob("*.json")} == names | {"mine", "notes"}
    best = best_plan(TABLES)
    assert best is not None
    assert Path(where["plan"]) == folder / f"{best.outline.plan}.json"
