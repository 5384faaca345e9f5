"""What a run leaves in its folder: its own plans and no others, and which of them to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic import BASE, make_run, with_intervals

from mpq.errors import MpqError
from mpq.flows.calibrate import aimed_at, calibrate
from mpq.flows.outputs import write_outputs
from mpq.program.plan import Plan, plan_name
from mpq.report.best import best_plan
from mpq.spec import RunSpec, parse_spec
from mpq.store.entries import Damaged, Store

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


@pytest.mark.parametrize("checkpoint", ["x" * 255, "/a/τ" * 90, "[/red]\x1b[2J", "\udcff", "a/.."])
def test_a_checkpoint_of_any_name_has_a_folder(
    checkpoint: str, spec: RunSpec, tmp_path: Path
) -> None:
    """Whatever others call a checkpoint, its run's name is one that a spec may have, with what watch adds to it."""
    aimed = aimed_at(spec, checkpoint)
    parse_spec({**spec.model_dump(mode="json"), "name": f"{aimed.name}-{'0' * 8}"})
    (tmp_path / "out" / aimed.name / "plans").mkdir(parents=True)


def test_what_is_told_before_hours_of_work(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow that is not started by `mpq run` looks whether it can write its results before anything is computed."""
    monkeypatch.setattr("mpq.flows.calibrate.tables_of", lambda *_: pytest.fail("begun"))
    with pytest.raises(MpqError, match=r"output folder .* cannot be written: /proc"):
        calibrate(spec.model_copy(update={"out": "/proc/nothing"}))


def test_a_table_that_goes_while_it_is_used_is_a_sentence(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What somebody removes from a store under a run's hands ends it with what to do, not with a traceback."""

    def gone(*_: object) -> None:
        raise Damaged("groups/0123 is not in the store")

    monkeypatch.setattr("mpq.flows.calibrate.tables_of", gone)
    with pytest.raises(MpqError, match=r"groups/0123 is not in the store\): run it again"):
        calibrate(spec)


def test_a_plan_is_found_its_model_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths in a plan lead from where the run was; from here first, where they lead somewhere."""
    store = Store((tmp_path / "store").as_uri())
    tables = {name: [store.write_table(name, "k", frame)] for name, frame in TABLES.items()}
    (tmp_path / "there" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    spec = parse_spec(
        {
            "model": {"path": "model", "base": BASE},
            "calibration": {"source": "org/data"},
            "objectives": {"et": {"formats": ["int8"]}},
            "out": str(tmp_path / "out"),
        }
    )
    where = write_outputs(spec, plans(), store.write_bytes("report", "k", b"", "html"), tables, {})
    plan = Plan.from_json(Path(where["plan"]).read_text())
    assert plan.origin("model") == "model"
    monkeypatch.chdir(tmp_path)
    assert plan.origin("model") == str(tmp_path / "there" / "model")
    assert plan.origin("evaluation") == "org/data"
