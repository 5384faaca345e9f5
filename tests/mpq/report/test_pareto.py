"""`mpq frontier` on a run made up here: what the table says follows from the gains, a point becomes a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from synthetic import make_groups
from typer.testing import CliRunner

from mpq.cli.main import app
from mpq.errors import MpqError
from mpq.program.gains import solve_table
from mpq.program.plan import Plan
from mpq.report.runs import write_run
from mpq.store.entries import Store
from mpq.store.tables import table

GROUPS = make_groups(2)
OPS = GROUPS.filter(kind="linear")
GAINS = table(
    "gains",
    [
        {
            "objective": "m",
            "group": order,
            "configuration": [f],
            "gain": 1e6 * (1 + order % 3) * (f == "int8"),
            "loss_mse": 1e-8 * (1 + order) * (f == "int8"),
            "loss_mse_stderr": 1e-9 * (f == "int8"),
            "kl": 1e-4 * (1 + order % 5) ** 2 * (f == "int8"),
            "kl_stderr": 1e-5 * (f == "int8"),
        }
        for order in OPS["order"]
        for f in ("bf16", "int8")
    ],
).with_columns(ops=pl.Series([[op] for op in OPS["op"] for _ in range(2)]))


def run_folder(folder: Path, **facts: str) -> Path:
    """A run's record whose plans measured 1.5 times the KL that was predicted."""
    store = Store((folder / "store").as_uri())
    solution = {"strategy": "ip_m", "objective": "m", "tau": 1.0, "seed": 0, "kl_scale": 1.5}
    loss = {"n_samples": 1, "mean_square_loss": 4.0, "mean_loss": 2.0}
    tables = {
        "groups": GROUPS,
        "gains": GAINS,
        "loss": table("loss", [loss]),
        "solutions": table("solutions", [solution]),
    }
    refs = {name: [store.write_table(name, "k", frame)] for name, frame in tables.items()}
    write_run(folder, "made-up", {"base": "bf16", **facts}, refs)
    return folder


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_the_table_and_a_plan_of_it(tmp_path: Path) -> None:
    """KL is that of the gains times the measured scale; each point gains what the program does at that bound; the plan too."""
    folder = run_folder(tmp_path)
    told = json.loads(run("frontier", folder, "--json", "--points", 12))
    assert (told["objective"], told["cost"], told["KL scale"]) == ("m", "kl", 1.5)
    rows = told["frontier"]
    assert rows[0]["gain"] == rows[0]["kl"] == rows[0]["ops_lowered"] == 0
    assert rows[-1]["ops_lowered"] == OPS.height
    for row in rows:
        _, best = solve_table(GAINS, {"kl": max(1e-12, row["kl"] / 1.5 * (1 + 1e-12))})
        assert row["gain"] == pytest.approx(best.gain)
        assert row["certified"]
    assert "bf16 → int8" in rows[0]["next"]
    assert rows[-1]["next"] is None
    file = tmp_path / "plan.json"
    run("frontier", folder, "--points", 12, "--plan", 5, "--out", file)
    plan = Plan.from_json(file.read_text())
    assert len(plan.lowered) == rows[5]["ops_lowered"]
    assert plan.predicted_kl == pytest.approx(rows[5]["kl"])
    assert plan.kl_bound == pytest.approx(rows[5]["kl"])
    assert plan.predicted_kl_error == pytest.approx(1.96 * rows[5]["kl_stderr"])
    # beside a plan that says how far the scale errs, that is in the error too
    (folder / "plans").mkdir()
    like = replace(plan, kl_scale_error=0.2)
    (folder / "plans" / "m-ip_m-kl0.1.json").write_text(like.to_json())
    run("frontier", folder, "--points", 12, "--plan", 5, "--out", file)
    again = Plan.from_json(file.read_text())
    assert again.kl_scale_error == 0.2
    wider = 1.96 * (rows[5]["kl_stderr"] + 0.2 * rows[5]["kl"])
    assert again.predicted_kl_error == pytest.approx(wider)
    by_op = dict(zip(GAINS["ops"].list.first(), GAINS["kl"], strict=True))
    assert plan.predicted_kl == pytest.approx(1.5 * sum(by_op[op] for op in plan.lowered))


def test_files_and_pictures(tmp_path: Path) -> None:
    """The table as a file, the frontier as a picture, on a terminal a few columns; against the loss where that is asked for."""
    folder = run_folder(tmp_path)
    shown = run("frontier", folder, "--out", tmp_path / "t.csv", "--picture", tmp_path / "p.svg")
    assert "one more op" in shown
    assert pl.read_csv(tmp_path / "t.csv").height >= 10
    assert "Pareto-optimal" in (tmp_path / "p.svg").read_text()
    told = json.loads(run("frontier", folder, "--json", "--cost", "loss_mse"))
    assert told["cost"] == "loss_mse"
    assert "KL scale" not in told


def test_the_runs_bounds_hold(tmp_path: Path) -> None:
    """Bounds of the run's spec hold at every point."""
    folder = run_folder(tmp_path, bounds='{"min_share": {"int8": 0.5}}')
    told = json.loads(run("frontier", folder, "--json", "--points", 6))
    assert min(row["ops_lowered"] for row in told["frontier"]) >= OPS.height / 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--plan", 3), "--plan needs --out FILE.json"),
        (("--plan", 3000, "--out", "plan.json"), "has no point 3000: expected 0 to"),
        (("--objective", "et"), "The run has no objective et: expected m"),
        (("--picture", "x.gif"), "ends in .png or .svg"),
        (("--out", "x.txt"), "ends in .parquet, .json, .csv"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: tuple[object, ...], told: str) -> None:
    """One sentence each."""
    with pytest.raises(MpqError, match=told.replace(".", r"\.")):
        run("frontier", run_folder(tmp_path), *arguments)
