"""The flow: every stage once, cached by content, and what is recomputed when something changes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import polars as pl
import pytest
from models import DEMO, ROOT, small_model, write_checkpoint

from flows.calibrate import calibrate
from mpq.errors import MpqError
from mpq.plan import Plan
from mpq.runs import join_tables
from mpq.spec import RunSpec

ALWAYS = {
    "load model",
    "partition",
    "sensitivity",
    "merge shards",
    "timing: measure",
    "timing",
    "gains",
    "solve",
    "evaluate base",
    "evaluate",
    "TTFT of plans",
    "TTFT of anchors",
    "collect",
    "report",
}


def change(spec: RunSpec, **parts: object) -> RunSpec:
    """The spec with parts replaced; a mapping updates the part of that name."""
    data = spec.model_dump(mode="json")
    for name, value in parts.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
    return RunSpec.model_validate(data)


def computed(outcome: dict) -> set[str]:
    """The stages of which at least one task was not cached."""
    return {name for name, tasks, cached, _ in outcome["stages"] if cached < tasks}


def test_a_run_and_what_it_leaves(spec: RunSpec) -> None:
    """All stages run; tables, plans, report and record are there; every plan keeps its budget; a second run computes nothing."""
    first = calibrate(spec)
    assert computed(first) == ALWAYS
    tables = join_tables(first["tables"])
    assert set(tables) == {"groups", "sensitivity", "loss", "timing", "plans", "solutions", "evaluation"}
    assert (tables["solutions"]["predicted_loss_mse"] <= tables["solutions"]["budget"]).all()
    assert set(tables["evaluation"]["metric"]) >= {"loss_mse", "ttft_s", "perplexity"}
    assert not tables["evaluation"].filter(pl.col("objective") == "m", pl.col("metric") == "ttft_s").height
    plan = Plan.from_json(Path(first["out"]["plan"]).read_text())
    assert plan.strategy == "ip_et"
    assert plan.provenance["model"] == spec.model.path
    assert "<html" in Path(first["out"]["report"]).read_text()[:200].lower()
    assert json.loads((Path(first["out"]["report"]).parent / "run.json").read_text())["name"] == "tiny"
    assert computed(calibrate(spec)) == set()


def test_what_each_change_costs(spec: RunSpec, tmp_path: Path) -> None:
    """A new τ solves and evaluates; other weights re-use partition and timing; a copy elsewhere re-uses everything."""
    calibrate(spec)
    assert computed(calibrate(change(spec, taus=[0.002]))) <= {"solve", "evaluate", "TTFT of plans", "collect", "report"}
    copy = shutil.copytree(spec.model.path, tmp_path / "elsewhere")
    assert computed(calibrate(change(spec, model={"path": str(copy)}))) <= {"report"}  # the report names the path
    write_checkpoint(Path(spec.model.path), seed=1)  # other weights under the same name
    again = computed(calibrate(spec))
    assert {"sensitivity", "evaluate base", "evaluate"} <= again
    assert not again & {"partition", "timing", "load model"}


def test_more_calibration_adds_shards(spec: RunSpec) -> None:
    """A spec with a new noise model re-uses every measurement."""
    calibrate(spec)
    assert not computed(calibrate(change(spec, noise_model="paper"))) & {"sensitivity", "timing", "partition"}


def test_how_times_are_spread_over_tasks_is_in_no_key(spec: RunSpec, tmp_path: Path) -> None:
    """Slices of another size find every time; with some gone and the limit raised, what is missing is measured and no more."""
    first = calibrate(change(spec, timing={"slice": 3, "limit": 16}))
    assert computed(calibrate(change(spec, timing={"slice": 7, "limit": 16}))) == set()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "measurement").glob("*/meta.json")}
    assert len(before) == join_tables(first["tables"])["timing"].height
    shutil.rmtree(tmp_path / "store" / "timing")
    gone = sorted(before)[:4]
    for path in gone:
        shutil.rmtree(path.parent)
    again = calibrate(change(spec, timing={"slice": None}))
    assert {"timing: measure", "timing"} <= computed(again)
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "measurement").glob("*/meta.json")}
    assert all(after[p] == at for p, at in before.items() if p not in gone), "what was there has been measured again"
    timing = join_tables(again["tables"])["timing"]
    assert timing.height == len(after) > len(before)
    assert timing.select("signature", "configuration").is_unique().all()


def test_damage_is_repaired(spec: RunSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged table is computed again, with a warning, and the outcome is the same."""
    first = calibrate(spec)
    ref = first["tables"]["sensitivity"][0]
    path = tmp_path / "store" / ref.kind / ref.key / f"{ref.sha256}.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING, "mpq"):
        again = calibrate(spec)
    assert "computing it again" in caplog.text
    assert "merge shards" in computed(again)
    assert join_tables(again["tables"])["sensitivity"].equals(join_tables(first["tables"])["sensitivity"])


def test_a_lost_prefect_loses_nothing(spec: RunSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With Prefect's own results gone, the store still knows what is done."""
    from prefect.settings import PREFECT_RESULTS_LOCAL_STORAGE_PATH, temporary_settings

    with temporary_settings({PREFECT_RESULTS_LOCAL_STORAGE_PATH: tmp_path / "one"}):
        calibrate(spec)
    with temporary_settings({PREFECT_RESULTS_LOCAL_STORAGE_PATH: tmp_path / "two"}):
        assert computed(calibrate(spec)) == set()


def test_mistakes_stop_the_flow_at_once(spec: RunSpec) -> None:
    """A format that is not native and an unreachable store are told before anything is computed."""
    with pytest.raises(MpqError, match="native"):
        calibrate(change(spec, objectives={"et": {"formats": ["fp8_e4m3"]}}))
    with pytest.raises(MpqError, match="store"):
        calibrate(change(spec, store="file:///proc/nope"))


def test_a_store_in_memory(spec: RunSpec) -> None:
    """Any fsspec URL serves as store, one that lives with the process too."""
    kept = change(spec, store="memory://a-run", objectives={"et": {"formats": ["bf16"], "strategies": ["ip"]}})
    assert computed(calibrate(kept)) >= ALWAYS
    assert computed(calibrate(kept)) == set()


def test_harness_tasks_beside_the_loss(spec: RunSpec) -> None:
    """Tasks named in the spec are scored for base and each plan, cached; a model without a tokenizer is told."""
    held_out = {
        "source": str(DEMO / "heldout.txt"),
        "tasks": ["piqa"],
        "data_dir": str(ROOT / "examples" / "tasks"),
        "task_limit": 4,
    }
    parts = {"objectives": {"m": {"formats": ["fp8_e4m3"], "strategies": ["ip"]}}, "taus": [0.01], "evaluation": held_out}
    data = {**spec.model_dump(mode="json"), **{k: v for k, v in parts.items() if k != "evaluation"}}
    data["evaluation"] = {**data["evaluation"], **held_out}
    with pytest.raises(MpqError, match="tokenizer"):
        calibrate(RunSpec.model_validate({**data, "evaluation": {**data["evaluation"], "source": spec.calibration.source}}))
    text = {**data["calibration"], "source": str(DEMO / "calibration.txt")}
    with_tokenizer = RunSpec.model_validate({**data, "model": {**data["model"], "path": str(DEMO)}, "calibration": text})
    outcome = calibrate(with_tokenizer)
    rows = join_tables(outcome["tables"])["evaluation"].filter(pl.col("task") == "piqa")
    assert set(rows["metric"]) >= {"acc", "acc_diff", "acc_diff_stderr"}
    assert {"tasks base", "tasks"} <= computed(outcome)
    assert computed(calibrate(with_tokenizer)) == set()


def test_broken_weights_are_told(spec: RunSpec) -> None:
    """NaN weights, then a checkpoint that ends in the middle: the sentence names the place."""
    weights = Path(spec.model.path) / "model.safetensors"
    model = small_model("llama", num_key_value_heads=2, tie_word_embeddings=True)
    model.get_submodule("model.layers.1.mlp.down_proj").weight.fill_(float("nan"))
    model.save_pretrained(spec.model.path)
    with pytest.raises(MpqError, match="The loss of calibration sample 0 is nan"):
        calibrate(spec)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(MpqError, match="the checkpoint is damaged"):
        calibrate(spec)


def test_a_failure_inside_a_task_is_told(spec: RunSpec, tmp_path: Path) -> None:
    """An error of a task reaches the caller as the sentence that it was."""
    with pytest.raises(MpqError, match="blocks of 16 tokens, 999 were asked for"):
        calibrate(change(spec, calibration={"samples": 999}))
