"""A run's tables are held against their contract where they are read: old ones are filled up, forged ones told."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from synthetic import BASE, make_run
from typer.testing import CliRunner

from mpq.cli.main import app
from mpq.errors import MpqError
from mpq.report.results import results_table
from mpq.report.runs import read_run, write_run
from mpq.store.entries import Store
from mpq.store.tables import LATER, table

PRICE = {
    "strategy": "ip_m",
    "objective": "m",
    "tau": 0.001,
    "constraint": "vllm: tie q k v",
    **dict.fromkeys(("gain", "gain_without", "loss_mse", "loss_mse_without"), 1.0),
}
GAIN = {"objective": "m", "group": 0, "configuration": [BASE], "gain": 0.0, "loss_mse": 0.0}
RUN = make_run(layers=1, seeds=1) | {
    "prices": table("prices", [PRICE]),
    "gains": table("gains", [GAIN]).with_columns(ops=pl.lit(["lm_head"])),
}


def written(folder: Path, tables: dict[str, pl.DataFrame]) -> Path:
    """The folder with the record of a run of these tables, each whole by its hash."""
    store = Store((folder / "store").as_uri())
    refs = {kind: [store.write_table(kind, "k", frame)] for kind, frame in tables.items()}
    write_run(folder, "made-up", {"base": BASE}, refs)
    return folder


@pytest.mark.parametrize("command", ["report", "frontier"])
@pytest.mark.parametrize(
    ("kind", "column", "value", "told"),
    [
        ("groups", "macs", "many", "groups table has the column macs of the wrong type"),
        ("groups", "window", "wide", "groups table has the column window of the wrong type"),
        ("groups", "parameters", None, "groups table has a row without a value in parameters"),
        ("gains", "gain", ..., "gains table lacks gain"),
        ("gains", "ops", 1, "gains table has the column ops of the wrong type"),
        ("gains", "objective", "x", "gains table has the objective x: expected et, tt, m"),
        ("timing", "repeats", "often", "timing table has a column of the wrong type"),
        ("timing", "base_tpot_s", "fast", "timing table has the column base_tpot_s of the wrong"),
        ("sensitivity", "kl", "low", "sensitivity table has the column kl of the wrong type"),
        ("solutions", "tau", None, "solutions table has a row without a value in tau"),
        ("solutions", "weight_bytes", "few", "solutions table has the column weight_bytes of the"),
        ("plans", "format", ..., "plans table lacks format"),
        ("prices", "objective", None, "prices table has a row without a value in objective"),
        ("prices", "gain", "a lot", "prices table has the column gain of the wrong type"),
        ("evaluation", "strategy", None, "evaluation table has a row without a value in strategy"),
        ("loss", "mean_square_loss", ..., "loss table lacks mean_square_loss"),
    ],
)
def test_a_forged_table_is_told(
    tmp_path: Path, command: str, kind: str, column: str, value: object, told: str
) -> None:
    """A table whose hash is right, and whose columns no version wrote, is one sentence that names the column."""
    frame = RUN[kind]
    forged = frame.drop(column) if value is ... else frame.with_columns(pl.lit(value).alias(column))
    folder = written(tmp_path, {**RUN, kind: forged})
    with pytest.raises(
        MpqError, match=rf"^The {told}.* No stage of mpq wrote this table"
    ) as caught:
        read_run(folder)
    done = CliRunner().invoke(app, [command, str(folder)])
    assert str(done.exception) == str(caught.value)


def test_tables_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Without the columns that came later, and under a column's old name, a run has the results that it had."""
    old = {kind: frame.drop(LATER.get(kind, ())) for kind, frame in RUN.items()}
    old["timing"] = (
        old["timing"].rename({"order_measured": "measured"}).drop("predicted", "clock", "threads")
    )
    _, tables = read_run(written(tmp_path, old))
    whole = {kind: frame for kind, frame in RUN.items() if kind not in LATER}
    expected = results_table({**whole, **{kind: old[kind] for kind in LATER}})
    assert results_table(tables).equals(expected)
    assert tables["timing"]["order_measured"].equals(RUN["timing"]["order_measured"])


def test_bounds_that_are_none(tmp_path: Path) -> None:
    """Something else in the place of the run's bounds is told; a run of one plan has a frontier of it alone."""
    folder = written(tmp_path, RUN)
    alone = json.loads(CliRunner().invoke(app, ["frontier", str(folder), "--json"]).stdout)
    assert [(p["gain"], p["next_cost"]) for p in alone["frontier"]] == [(0.0, None)]
    record = json.loads((folder / "run.json").read_text())
    for bounds in ("x", '{"bits": 3}'):
        record["facts"]["bounds"] = bounds
        (folder / "run.json").write_text(json.dumps(record))
        done = CliRunner().invoke(app, ["frontier", str(folder)])
        assert str(done.exception).startswith(f"The run's record has bounds = {bounds!r}, expected")


def test_a_run_without_what_a_frontier_is_of(tmp_path: Path) -> None:
    """Gains of which the groups are missing, or are another model's, are told."""
    without = {kind: frame for kind, frame in RUN.items() if kind != "groups"}
    of_others = RUN["gains"].with_columns(ops=pl.lit(["a", "b"]))
    for tables, told in (
        (without, "The run has no groups table"),
        ({**RUN, "gains": RUN["gains"].clear()}, "The run has no gains table"),
        ({**RUN, "gains": of_others}, "1 formats for group 0, which has 2 ops"),
    ):
        done = CliRunner().invoke(app, ["frontier", str(written(tmp_path, tables))])
        assert told in str(done.exception)
