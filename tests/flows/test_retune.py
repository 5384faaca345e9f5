"""Other bounds on the same tables, and times without a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from small import write_checkpoint
from test_calibrate import change, computed

from mpq.errors import MpqError
from mpq.flows.calibrate import calibrate
from mpq.flows.campaign import campaign
from mpq.flows.retune import retune
from mpq.report.runs import join_tables
from mpq.spec import BoundSpec, ModelSpec, RunSpec


def test_a_new_bound_only_solves(calibrated: tuple[RunSpec, dict[str, Any]]) -> None:
    """Nothing is measured for another τ, one with signs, or objective; with `evaluate` the plans are run; the first run's files stay."""
    spec, _ = calibrated
    tuned = retune(spec, taus=[0.5, 1.0])
    assert computed(tuned) <= {"gains", "solve", "report"}
    assert {name for name, *_ in tuned["stages"]} & {"evaluate", "TTFT of plans"} == set()
    tables = join_tables(tuned["tables"])
    assert set(tables["solutions"]["tau"]) == {0.5, 1.0}
    assert "evaluation" not in tables
    assert tuned["out"]["plans"] != str(Path(spec.out) / spec.name / "plans")
    signed = retune(spec, bound=BoundSpec.model_validate({"tau": 0.5, "signed": True}))
    assert computed(signed) <= {"gains", "solve", "report"}
    solved = join_tables(signed["tables"])["solutions"]
    assert solved["predicted_loss_mse"].equals(solved["predicted_signed_mse"])
    assert solved.filter(pl.col("predicted_loss_mse") > pl.col("budget")).is_empty()
    one = retune(spec, objective="tt", formats=["fp8_e4m3"])
    assert computed(one) == {"gains", "solve", "report"}
    assert set(join_tables(one["tables"])["solutions"]["objective"]) == {"tt"}
    run = retune(spec, taus=[0.5], objective="et", evaluate=True)
    assert "evaluation" in run["tables"]


def test_a_new_bound_on_kl(calibrated: tuple[RunSpec, dict[str, Any]]) -> None:
    """Solved on the tables that are there; with `evaluate` the plans are measured before they are delivered, and none is over."""
    spec, _ = calibrated
    bound = BoundSpec.model_validate({"kl": [1e-5, 1e-3]})
    tuned = retune(spec, bound=bound)
    assert computed(tuned) <= {"gains", "solve", "report"}
    assert join_tables(tuned["tables"])["solutions"]["checked_kl"].null_count() == 4
    checked = join_tables(retune(spec, bound=bound, evaluate=True)["tables"])["solutions"]
    assert (checked["checked_kl"] <= checked["kl_bound"]).all()
    with pytest.raises(MpqError, match="taus and a bound"):
        retune(spec, taus=[0.5], bound=bound)


def test_what_was_not_measured_is_told(spec: RunSpec) -> None:
    """An empty store, formats without an objective, a format that nobody measured, times that nobody took."""
    with pytest.raises(MpqError, match="run calibrate with this spec first"):
        retune(spec, taus=[0.5])
    with pytest.raises(MpqError, match="without an objective"):
        retune(spec, formats=["bf16"])
    with pytest.raises(MpqError, match="int8 was not measured"):
        retune(spec, objective="m", formats=["int8"])
    with pytest.raises(MpqError, match="nothing was timed"):
        retune(spec.model_copy(update={"objectives": {"m": spec.objectives["m"]}}), objective="et")


def test_a_campaign_times_for_runs_to_come(spec: RunSpec, tmp_path: Path) -> None:
    """From a configuration alone; a checkpoint that comes later finds partition and timing done."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(Path(spec.model.path) / "config.json", bare)
    model = ModelSpec(path=str(bare), base="fp32")
    done = campaign(model, ["bf16"], spec.timing, spec.store)
    assert computed(done) == {"partition", "timing: measure", "timing"}
    write_checkpoint(Path(spec.model.path), seed=3)
    assert not computed(calibrate(change(spec, name="later"))) & {"partition", "timing"}
    with pytest.raises(MpqError, match="the campaign is for TPU-of-tomorrow"):
        campaign(model, ["bf16"], spec.timing, spec.store, device_kind="TPU-of-tomorrow")
    with pytest.raises(MpqError, match="native"):
        campaign(model, ["fp8_e4m3"], spec.timing, spec.store)
