"""The flow: every stage once, cached by content, and what is recomputed when something changes."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from prefect.settings import PREFECT_RESULTS_LOCAL_STORAGE_PATH, temporary_settings
from small import DEMO, ROOT, short, small_model, write_checkpoint

from mpq.errors import MpqError
from mpq.flows.calibrate import calibrate
from mpq.loss import sensitivity
from mpq.models.text import read_blocks
from mpq.program.plan import Plan
from mpq.report.runs import join_tables, read_run
from mpq.spec import RunSpec

ALWAYS = {
    "load model",
    "partition",
    "sensitivity",
    "merge shards",
    "first layer",
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


def test_a_run_and_what_it_leaves(
    spec: RunSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All stages run, by names that say what runs on what; tables, plans, report and record are there; every plan keeps
    its budget; a second run computes nothing, and nor does one from which Prefect's own results are gone."""
    spec = change(spec, objectives={"et": {"formats": ["bf16"]}}, timing={"slice": 20})
    with caplog.at_level(logging.INFO):
        first = calibrate(spec)
    assert computed(first) == ALWAYS
    assert "flow run 'tiny model'" in caplog.text
    for name in (
        "partition tiny model",
        "sensitivity tiny model shard 2/2",
        "evaluate tiny model ip_m m tau=0.01 seed 0",
    ):
        assert f"{name}: computing" in caplog.text
    assert re.search(r"timing: measure tiny model \S*down_proj-[0-9a-f]{8}", caplog.text)
    assert change(spec, name="the-model").title == "the-model"

    tables = join_tables(first["tables"])
    assert set(tables) == {
        "groups",
        "drawn",
        "sensitivity",
        "loss",
        "effects",
        "timing",
        "plans",
        "solutions",
        "gains",
        "evaluation",
    }
    assert (tables["solutions"]["predicted_loss_mse"] <= tables["solutions"]["budget"]).all()
    assert set(tables["evaluation"]["metric"]) >= {"loss_mse", "ttft_s", "perplexity"}
    assert (
        not tables["evaluation"]
        .filter(pl.col("objective") == "m", pl.col("metric") == "ttft_s")
        .height
    )
    plan = Plan.from_json(Path(first["out"]["plan"]).read_text())
    assert plan.objective == "et"
    assert plan.provenance["model"] == spec.model.path
    assert "<html" in Path(first["out"]["report"]).read_text()[:200].lower()
    assert (
        json.loads((Path(first["out"]["report"]).parent / "run.json").read_text())["name"] == "tiny"
    )
    assert computed(calibrate(spec)) == set()
    with temporary_settings({PREFECT_RESULTS_LOCAL_STORAGE_PATH: tmp_path / "elsewhere"}):
        assert computed(calibrate(spec)) == set()


def test_what_each_change_costs(calibrated: tuple[RunSpec, dict[str, Any]], tmp_path: Path) -> None:
    """A new τ solves and evaluates; a new noise model measures nothing; other weights re-use partition and timing; a copy
    elsewhere re-uses everything."""
    spec, _ = calibrated
    assert computed(calibrate(change(spec, taus=[0.002]))) <= {
        "solve",
        "evaluate",
        "TTFT of plans",
        "collect",
        "report",
    }
    copy = shutil.copytree(spec.model.path, tmp_path / "elsewhere")
    assert computed(calibrate(change(spec, model={"path": str(copy)}))) <= {
        "report"
    }  # the report names the path
    assert not computed(calibrate(change(spec, noise_model="paper"))) & {
        "sensitivity",
        "timing",
        "partition",
    }
    write_checkpoint(Path(spec.model.path), seed=1)  # other weights under the same name
    again = computed(calibrate(spec))
    assert {"sensitivity", "evaluate base", "evaluate"} <= again
    assert not again & {"partition", "timing", "load model"}


def test_how_times_are_spread_over_tasks_is_in_no_key(spec: RunSpec, tmp_path: Path) -> None:
    """Slices of another size find every time; with some gone and the limit raised, what is missing is measured and no more."""
    # no rounds: what they choose depends on the times
    first = calibrate(change(spec, timing={"slice": 3, "limit": 8, "rounds": 0}))
    assert computed(calibrate(change(spec, timing={"slice": 7, "limit": 8, "rounds": 0}))) == set()
    before = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "measurement").glob("*/meta.json")
    }
    assert len(before) == join_tables(first["tables"])["timing"].height
    shutil.rmtree(tmp_path / "store" / "timing")
    gone = sorted(before)[:4]
    for path in gone:
        shutil.rmtree(path.parent)
    again = calibrate(change(spec, timing={"slice": None, "rounds": 0}))
    assert {"timing: measure", "timing"} <= computed(again)
    after = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "measurement").glob("*/meta.json")
    }
    assert all(after[p] == at for p, at in before.items() if p not in gone), (
        "what was there has been measured again"
    )
    timing = join_tables(again["tables"])["timing"]
    assert timing.height == len(after) > len(before)
    assert timing.select("signature", "configuration").is_unique().all()


def test_damage_is_repaired(
    calibrated: tuple[RunSpec, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged table is computed again, with a warning, and the outcome is the same."""
    spec, first = calibrated
    ref = first["tables"]["sensitivity"][0]
    path = tmp_path / "store" / ref.kind / ref.key / f"{ref.sha256}.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING, "mpq"):
        again = calibrate(spec)
    assert "computing it again" in caplog.text
    assert "first layer" in computed(again)
    assert join_tables(again["tables"])["sensitivity"].equals(
        join_tables(first["tables"])["sensitivity"]
    )


def test_mistakes_stop_the_flow_at_once(spec: RunSpec) -> None:
    """A format that is not native, a device that is not there and an unreachable store are told before anything is computed."""
    with pytest.raises(MpqError, match="There is no cuda:99 here"):
        calibrate(
            change(spec, model={"device": "cuda:99"}).model_copy(
                update={"objectives": {"m": spec.objectives["m"]}}
            )
        )
    assert not any(Path(spec.store.removeprefix("file://")).glob("*/*"))
    with pytest.raises(MpqError, match="native"):
        calibrate(change(spec, objectives={"et": {"formats": ["fp8_e4m3"]}}))
    with pytest.raises(MpqError, match="store"):
        calibrate(change(spec, store="file:///proc/nope"))


def test_a_store_in_memory(spec: RunSpec) -> None:
    """Any fsspec URL serves as store, one that lives with the process too."""
    kept = change(
        spec, store="memory://a-run", objectives={"et": {"formats": ["bf16"], "strategies": ["ip"]}}
    )
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
    parts = {
        "objectives": {"m": {"formats": ["fp8_e4m3"], "strategies": ["ip"]}},
        "taus": [0.01],
        "evaluation": held_out,
    }
    data = {**spec.model_dump(mode="json"), **{k: v for k, v in parts.items() if k != "evaluation"}}
    data["evaluation"] = {**data["evaluation"], **held_out}
    with pytest.raises(MpqError, match="tokenizer"):
        calibrate(
            RunSpec.model_validate(
                {**data, "evaluation": {**data["evaluation"], "source": spec.calibration.source}}
            )
        )
    text = {**data["calibration"], "source": str(DEMO / "calibration.txt")}
    with_tokenizer = RunSpec.model_validate(
        {**data, "model": {**data["model"], "path": str(DEMO)}, "calibration": text}
    )
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
    with pytest.raises(
        MpqError, match=r"cannot be read as safetensors .* fetch the checkpoint again"
    ):
        calibrate(spec)


def test_a_failing_shard_leaves_the_others(spec: RunSpec, caplog: pytest.LogCaptureFixture) -> None:
    """One shard meets a token whose weights are NaN: the other's table stays, and is reused once the text is mended."""
    model = small_model("llama", num_key_value_heads=2, tie_word_embeddings=True)
    model.get_submodule("model.embed_tokens").weight[96] = float("nan")
    model.lm_head.weight = torch.nn.Parameter(
        model.lm_head.weight.nan_to_num(0.0), requires_grad=False
    )
    model.config.tie_word_embeddings = False
    model.save_pretrained(spec.model.path)
    tokens = np.random.default_rng(0).integers(0, 96, (8, 16))
    np.save(spec.calibration.source, tokens)
    split = change(short(spec), calibration={"seed": 0})
    blocks = read_blocks(split.calibration, Path(spec.model.path), 97).tokens
    row = int((tokens == blocks[-1]).all(axis=1).argmax())
    spoilt = tokens.copy()
    spoilt[row, 3] = 96
    np.save(spec.calibration.source, spoilt)
    with pytest.raises(MpqError, match="is nan"):
        calibrate(split)
    np.save(spec.calibration.source, tokens)
    with caplog.at_level(logging.INFO):
        outcome = calibrate(split)
    assert ("sensitivity", 2, 1) in [stage[:3] for stage in outcome["stages"]]
    assert "sensitivity: 1 of 2 tasks cached" in caplog.text
    assert "Finished in state Cached" in caplog.text


def test_what_is_tried_again(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard whose device fails once is measured again; a mistake of the user's is told at once."""
    measure, tried = sensitivity.measure, []

    def once(*args: Any, **options: Any) -> Any:
        tried.append(len(args[2].tokens))
        if len(tried) == 1:
            raise RuntimeError("the device went away")
        return measure(*args, **options)

    monkeypatch.setattr(sensitivity, "measure", once)
    outcome = calibrate(short(spec))
    assert tried == [4, 4, 4]
    assert ("sensitivity", 2, 0) in [stage[:3] for stage in outcome["stages"]]
    tried.clear()

    def mistaken(*args: Any, **options: Any) -> Any:
        tried.append(0)
        raise MpqError("No.")

    monkeypatch.setattr(sensitivity, "measure", mistaken)
    with pytest.raises(MpqError, match="No"):
        calibrate(change(short(spec), calibration={"seed": 3}))
    assert len(tried) == 2, "once for each shard"


def test_a_task_that_takes_too_long(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that exceeds the spec's time is given up with a sentence that names it."""

    def slowly(*args: object) -> None:
        for _ in range(6000):
            time.sleep(0.01)

    monkeypatch.setattr("mpq.evaluation.sampling.draw", slowly)
    with pytest.raises(
        MpqError, match=r"load model tiny model took longer than 1 s: .*runner.timeout_s"
    ):
        calibrate(change(spec, runner={"timeout_s": 1}))


def test_a_failure_inside_a_task_is_told(spec: RunSpec, tmp_path: Path) -> None:
    """An error of a task reaches the caller as the sentence that it was."""
    with pytest.raises(MpqError, match="blocks of 16 tokens, 999 were asked for"):
        calibrate(change(spec, calibration={"samples": 999}))


def test_a_store_that_can_only_be_read(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is in it serves a re-run; what is not there is told with the reason why nothing can be computed into it."""
    calibrate(spec)

    def refused(*args: object) -> None:
        raise MpqError("The store cannot be written (read-only): check it.")

    monkeypatch.setattr("mpq.store.entries.Store._write", refused)
    assert computed(calibrate(spec)) == set()
    with pytest.raises(MpqError, match="read-only"):
        calibrate(change(spec, taus=[0.02]))


def test_a_record_is_read_from_any_folder(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A store named from one folder is found from another: the run's record says where it is for everyone."""
    monkeypatch.chdir(tmp_path)
    short = {"m": {"formats": ["fp8_e4m3"], "strategies": ["ip"]}}
    outcome = calibrate(change(spec, store="beside", objectives=short, taus=[0.01]))
    assert (tmp_path / "beside" / "groups").is_dir()
    monkeypatch.chdir("/")
    _, tables = read_run(Path(outcome["out"]["report"]).parent)
    assert tables["evaluation"].height


def test_what_is_uncertain_is_asked_once(spec: RunSpec) -> None:
    """Gains known to ± target are looked for by a stage of its own; what it found is found again, not fitted anew."""
    timing = {"limit": 8, "target": 0.5, "cap": 4, "more": 2, "rounds": 1}
    asked = change(spec, timing=timing, taus=[0.01])
    assert "what is uncertain" in computed(calibrate(asked))
    assert computed(calibrate(asked)) == set()
    assert "what is uncertain" in computed(calibrate(change(asked, timing={"more": 3})))


def test_plans_are_measured_on_the_calibration_text(spec: RunSpec) -> None:
    """Where a spec says nothing of an evaluation, whatever else it says of the calibration."""
    spec = change(short(spec), evaluation=None, calibration={"labels": 2, "share": 0.5})
    tables = join_tables(calibrate(spec)["tables"])
    assert "loss_mse" in tables["evaluation"]["metric"].to_list()
    drawn = tables["drawn"]
    assert drawn.n_unique("part") > 1
    assert drawn["source"].unique().to_list() == [spec.calibration.source]
