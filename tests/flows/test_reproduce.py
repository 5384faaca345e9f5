"""The sweep: its cost told beforehand, nothing computed twice, the tasks' documents drawn and recorded, every figure made."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from safetensors.torch import load_file, save_file
from small import DEMO, ROOT, small_spec
from test_calibrate import change, computed

from mpq.errors import MpqError
from mpq.evaluation import task_data
from mpq.flows.reproduce import reproduce
from mpq.report.runs import join_tables, read_run
from mpq.spec import RunSpec, parse_spec

pytest.importorskip("lm_eval")
EVALUATIONS = ("evaluate", "tasks")


def sweep_of(spec: RunSpec) -> RunSpec:
    """A small sweep of the demo checkpoint: two tasks of four documents, calibrated on a share of the tasks' documents."""
    text = {"source": "tasks", "samples": 8, "length": 32, "batch": 8}
    return parse_spec(
        {
            **spec.model_dump(mode="json"),
            "name": "sweep",
            "model": {"path": str(DEMO), "base": "fp32"},
            "calibration": {**text, "shards": 2},
            "evaluation": {
                **text,
                "seeds": 2,
                "tasks": ["piqa", "winogrande"],
                "data_dir": str(ROOT / "examples" / "tasks"),
                "task_limit": 4,
            },
            "objectives": {
                "tt": {"formats": ["fp8_e5m2"], "random_seeds": 2, "taus": [0.003]},
                "m": {"formats": ["fp8_e5m2"], "strategies": ["ip"], "taus": [0.002]},
            },
        }
    )


@pytest.fixture
def sweep(spec: RunSpec) -> RunSpec:
    """A sweep that has not begun."""
    return sweep_of(spec)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSpec, Any, Any]:
    """A sweep that is done: its spec, what a dry run said before it, and its outcome."""
    spec = sweep_of(small_spec(tmp_path_factory.mktemp("sweep")))
    return spec, reproduce(spec, dry_run=True), reproduce(spec)


def forecast(outcome: dict) -> dict[str, tuple[int, int, bool]]:
    """Stage → tasks, cached, bound."""
    return {
        row["stage"]: (row["tasks"], row["cached"], row["bound"]) for row in outcome["forecast"]
    }


def test_cost_is_told_and_nothing_is_computed_twice(swept: tuple[RunSpec, Any, Any]) -> None:
    """A dry run computes no evaluation and gives a bound; after the run everything is cached; a new seed or task adds its own alone."""
    sweep, dry, first = swept
    assert set(dry) == {"forecast"}
    plans = 4 + 2 + 1  # ip, prefix, two draws of random and two uniform ones under tt; ip under m
    assert forecast(dry)["evaluate"] == (plans * 2, 0, True)
    assert forecast(dry)["tasks"] == (plans * 2 * 2, 0, True)
    assert all(
        row["seconds"] > 0
        for row in dry["forecast"]
        if row["stage"] in (*EVALUATIONS, "sensitivity")
    )

    assert set(EVALUATIONS) <= computed(first)
    done = forecast(reproduce(sweep, dry_run=True))
    assert all(tasks == cached and not bound for tasks, cached, bound in done.values())
    distinct = done["evaluate"][0] // 2
    assert 2 <= distinct <= plans
    assert done["tasks"][0] == distinct * 2 * 2
    assert computed(reproduce(sweep)) == set()

    more = forecast(reproduce(change(sweep, evaluation={"seeds": 3}), dry_run=True))
    assert more["evaluate"] == (distinct * 3, distinct * 2, False)
    assert more["tasks"] == (distinct * 3 * 2, distinct * 2 * 2, False)

    out = Path(first["out"]["report"]).parent
    figures = {p.name for p in Path(first["out"]["figures"]).iterdir()}
    assert {
        "figure_2.svg",
        "figure_3b.png",
        "figure_8.svg",
        "figure_9.png",
        "table_1.md",
        "table_1.csv",
    } <= figures
    assert len(first["left_out"]) == 5  # 1, 3a, 4, 5, 7: nothing was timed
    _, tables = read_run(out)
    drawn = tables["drawn"]
    for task in ("piqa", "winogrande"):
        of = drawn.filter(pl.col("source") == task)
        documents = of["of"][0]
        calibrated, evaluated, scored = (
            set(of.filter(pl.col("part") == p)["index"])
            for p in ("calibration", "evaluation", "tasks")
        )
        assert len(calibrated) == math.ceil(0.2 * documents)
        assert calibrated | evaluated == set(range(documents))
        assert not calibrated & evaluated
        assert scored == set(range(4))


def test_every_strategy_meets_the_same_tau_seeds_and_tasks(swept: tuple[RunSpec, Any, Any]) -> None:
    """The evaluation table has a row for each plan, seed, task and metric; random's draws apart."""
    rows = join_tables(swept[2]["tables"])["evaluation"].filter(
        pl.col("metric").is_in(["acc", "loss_mse"])
    )
    counted = (
        rows.group_by("objective", "strategy", "plan_seed")
        .agg(pl.len())
        .sort("objective", "strategy", "plan_seed")
    )
    each = 2 * 3  # seeds × (the text and two tasks)
    assert counted.rows() == [
        ("m", "ip_m", 0, each),
        ("tt", "ip_tt", 0, each),
        ("tt", "prefix", 0, each),
        ("tt", "random", 0, each),
        ("tt", "random", 1, each),
        ("tt", "uniform_fp8_e5m2", 0, each),
        ("tt", "uniform_fp8_e5m2_but_head", 0, each),
    ]


def test_tasks_calibrate_only_where_some_are_named(sweep: RunSpec) -> None:
    """A share of no tasks is one sentence; so is a share that fills no block."""
    with pytest.raises(MpqError, match=r"name some in evaluation\.tasks"):
        parse_spec({**sweep.model_dump(mode="json"), "evaluation": {"source": "tasks"}})
    with pytest.raises(MpqError, match=r"20% of piqa, winogrande hold .* were asked for"):
        reproduce(change(sweep, calibration={"samples": 100_000}), dry_run=True)


def test_mistakes_in_tasks(sweep: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that does not exist, a dataset without a column: one sentence each, before anything is computed.

    Who is meant is looked for among three tasks: to index all of them takes ten seconds, once in test_harness.py.
    """
    few = task_data._manager(("hellaswag", "piqa", "winogrande"))
    monkeypatch.setattr(task_data, "_every_task", lambda: few)
    shutil.copytree(ROOT / "examples" / "tasks", tmp_path / "data")
    for path in (tmp_path / "data" / "piqa").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(
                json.dumps({k: v for k, v in row.items() if k != "sol2"}) + "\n" for row in rows
            )
        )
    for evaluation, message in [
        ({"tasks": ["hellasweg"]}, "has no task hellasweg: did you mean hellaswag"),
        (
            {"data_dir": str(tmp_path / "data")},
            r"validation\.jsonl lacks the column sol2 that task piqa asks for",
        ),
    ]:
        with pytest.raises(MpqError, match=message):
            reproduce(change(sweep, evaluation=evaluation))
    assert not (tmp_path / "store" / "sensitivity").exists()


def test_what_overflows_stays_in_base(
    sweep: RunSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An op whose values a format cannot hold is left out of it, which is told; the sweep goes on, and all it finds is finite."""
    data = sweep.model_dump(mode="json")
    data["model"]["path"] = str(overflowing(tmp_path / "overflowing"))
    data["objectives"] = {"tt": {"formats": ["fp16"], "strategies": ["ip"], "taus": [0.5]}}
    data["out"] = str(tmp_path / "out")
    with caplog.at_level(logging.WARNING, "mpq"):
        reproduce(parse_spec(data))
    assert "model.layers.1.mlp.down_proj … in fp16: values overflow, left out" in caplog.text
    _, tables = read_run(tmp_path / "out" / data["name"])
    taken = dict(tables["plans"].select("op", "format").iter_rows())
    assert taken["model.layers.1.mlp.down_proj"] == "fp32"
    assert taken["model.layers.0.mlp.down_proj"] == "fp16"
    assert tables["evaluation"]["value"].is_finite().all()


def overflowing(folder: Path) -> Path:
    """The demo checkpoint with the activations before one down_proj beyond FP16's range; what it computes stays the same."""
    shutil.copytree(DEMO, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 2.0**20
    weights["model.layers.1.mlp.down_proj.weight"] *= 2.0**-20
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
