"""A run bounded by KL: what its tables and plans say, and what a change of the bound costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from mpq.flows.calibrate import calibrate
from mpq.program.plan import Plan
from mpq.report.runs import join_tables
from mpq.spec import RunSpec, parse_spec


def test_a_run_bounded_by_kl(calibrated: tuple[RunSpec, dict[str, Any]]) -> None:
    """A plan for each κ, within it by prediction, measured, reported and read back; sensitivity is not measured again."""
    done, _ = calibrated
    data = done.model_dump(mode="json", exclude={"taus"})
    kls = (1e-4, 1e-2)
    found = calibrate(parse_spec({**data, "bound": {"kl": kls}}))
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
