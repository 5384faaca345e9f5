"""A run bounded by KL: what its tables and plans say, and what a change of the bound costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from mpq.evaluation.losses import divergences
from mpq.flows.calibrate import calibrate
from mpq.models.blocks import Blocks
from mpq.models.loading import load_model
from mpq.models.text import draw_blocks
from mpq.program.plan import Plan
from mpq.report.runs import join_tables
from mpq.spec import EvaluationSpec, RunSpec, parse_spec


def test_a_run_bounded_by_kl(calibrated: tuple[RunSpec, dict[str, Any]]) -> None:
    """A plan for each κ, within it by prediction, measured, reported and read back; sensitivity is not measured again."""
    done, _ = calibrated
    data = done.model_dump(mode="json", exclude={"taus"})
    kls = (1e-4, 1e-2)
    found = calibrate(parse_spec({**data, "bound": {"kl": kls, "rounds": 0}}))
    assert "sensitivity" not in {
        name for name, tasks, cached, _ in found["stages"] if cached < tasks
    }
    tables = join_tables(found["tables"])
    solutions = tables["solutions"].filter(pl.col("strategy") == "ip_m").sort("kl_bound")
    assert solutions["kl_bound"].to_list() == list(kls)
    assert (solutions["predicted_kl"] <= solutions["kl_bound"]).all()
    assert (solutions["predicted_kl_error"] >= 0).all()
    assert solutions["budget"].null_count() == 2
    assert solutions["predicted_kl"][1] > 0
    rows = tables["sensitivity"].filter(pl.col("noise_model") == "actual")
    kl = {(o, f): v for o, f, v in rows.group_by("op", "format").agg(pl.col("kl").sum()).rows()}
    folder = Path(found["out"]["report"]).parent / "plans"
    for bound, predicted in solutions.select("kl_bound", "predicted_kl").iter_rows():
        plan = Plan.from_json((folder / f"m-ip_m-kl{bound:g}.json").read_text())
        assert plan.predicted_kl == predicted
        of_ops = sum(kl[op, f] for op, f in plan.formats.items())
        assert abs(of_ops - predicted) <= 1e-9 * predicted
    measured = tables["evaluation"].filter(pl.col("metric") == "kl", pl.col("strategy") == "ip_m")
    assert measured.height == 2
    assert measured["value"].max() > 0
    assert "KL divergence" in Path(found["out"]["report"]).read_text()


def test_delivered_plans_were_measured(calibrated: tuple[RunSpec, dict[str, Any]]) -> None:
    """Under a bound between what plans cost, each delivered plan's KL on the text named is within it, by the model run again."""
    done, _ = calibrated
    data = done.model_dump(mode="json", exclude={"taus"})
    bound = {"kl": [3e-5, 3e-4], "robust": 0.9}
    found = calibrate(parse_spec({**data, "bound": bound}))
    tables = join_tables(found["tables"])
    folder = Path(found["out"]["report"]).parent / "plans"
    plans = [Plan.from_json(path.read_text()) for path in folder.glob("*-ip_*-kl*.json")]
    assert len(plans) == 4
    folder_of_model = Path(data["model"]["path"])
    model = load_model(folder_of_model, data["model"]["base"])
    every = draw_blocks(EvaluationSpec(**data["evaluation"]), folder_of_model, 97)
    drawn = tables["drawn"].filter(part="check")["index"].to_list()
    blocks = Blocks(every.rows[drawn])
    for plan in plans:
        kls = divergences(model, plan.formats, blocks, base=plan.base)
        assert plan.checked_kl == pytest.approx(kls.mean(), rel=1e-4, abs=1e-12)
        assert plan.checked_kl <= plan.kl_bound
        assert plan.kl_scale != 1
        told = plan.provenance["check"]
        assert "blocks of" in told["text"]
        assert {round["measured_kl"] for round in told["rounds"]}
        assert 0 <= plan.risk <= 0.1 + 1e-9
        row = (
            tables["solutions"]
            .filter(objective=plan.objective, strategy=plan.strategy, kl_bound=plan.kl_bound)
            .row(0, named=True)
        )
        for name in ("checked_kl", "predicted_kl", "predicted_gain", "risk", "kl_scale"):
            assert row[name] == getattr(plan, name)
        ops = tables["plans"].filter(objective=plan.objective, strategy=plan.strategy, tau=plan.tau)
        assert dict(ops.select("op", "format").iter_rows()) == plan.formats
