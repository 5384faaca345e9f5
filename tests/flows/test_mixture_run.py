"""A whole run of a mixture of experts, and the method's steps on others."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from small import small_spec, write_checkpoint

from mpq.flows.calibrate import calibrate
from mpq.report.runs import join_tables
from mpq.spec import parse_spec
from mpq.tasks.stage import read, read_json


def test_a_run_of_a_mixture(tmp_path: Path) -> None:
    """A Mixtral for vLLM, from its checkpoint to the report: experts are measured, timed, chosen alike in a layer, evaluated;
    the router stays in base."""
    data = small_spec(tmp_path).model_dump(mode="json")
    data["model"]["path"] = str(write_checkpoint(tmp_path / "mixture", model_type="mixtral"))
    int8 = {"formats": ["int8"], "strategies": ["ip", "uniform"]}
    spec = parse_spec({**data, "objectives": {"et": int8, "m": int8}, "engine": "vllm"})
    result = calibrate(spec)
    tables = join_tables(result["tables"])
    experts = tables["groups"].filter(pl.col("kind") == "experts")["op"].to_list()
    assert len(experts) == 4
    counted = tables["sensitivity"].filter(pl.col("op") == experts[0])["expert_tokens"]
    assert counted.list.sum().unique().to_list() == [8 * 16 * 2]
    of_experts = tables["timing"].filter(pl.col("signature").str.starts_with("gate_up_proj"))
    assert sorted(of_experts["configuration"].to_list()) == [["fp32"] * 2, ["int8"] * 2]
    plans = [plan for ref in result["plan_files"] for plan in read_json(ref)]
    for plan in plans:
        taken = plan["formats"]
        for layer in range(2):
            of = {taken[op] for op in experts if f".{layer}." in op}
            assert len(of) == 1
            assert taken.get(f"model.layers.{layer}.mlp.gate", "fp32") == "fp32"
    lowest = next(p for p in plans if p["strategy"] == "uniform_int8")
    assert {lowest["formats"][op] for op in experts} == {"int8"}
    weights = tables["groups"].filter(pl.col("kind").is_in(["linear", "experts"]))
    head = weights.filter(pl.col("op") == "lm_head")["parameters"].sum()
    scales = 4 * (weights["parameters"] // weights["in_features"]).sum() - 4 * 97
    assert lowest["weight_bytes"] == weights["parameters"].sum() + 3 * head + scales
    measured = tables["evaluation"].filter(
        pl.col("strategy") == "uniform_int8", pl.col("metric") == "kl"
    )
    assert (measured["value"] > 0).all()
    assert any(
        "experts" in row["constraint"]
        for ref in result["tables"].get("prices", [])
        for row in read(ref).iter_rows(named=True)
    )
