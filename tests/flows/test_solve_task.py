"""The task that solves and the one that collects: uniform plans once an objective, gains with their
intervals."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from prefect.logging import disable_run_logger
from synthetic import BASE, make_groups

from mpq.errors import MpqError
from mpq.spec import Bound, ObjectiveSpec
from mpq.store.entries import Store
from mpq.store.tables import table
from mpq.tasks import evaluation, planning
from mpq.tasks.stage import read, read_json


def inputs_of(
    store: Store, limits: list[Bound], moves: list[tuple[float, float]]
) -> dict[str, Any]:
    """Of the stage that solves: weights of one layer in base or INT8, for memory; `moves` are what rounding the first linears'
    weights does to two samples (nats), and the last of them what the others' does."""
    groups = make_groups(1)
    linears = groups.filter(pl.col("kind") == "linear").select("order", "parameters")
    gains = [
        {
            "objective": "m",
            "group": order,
            "configuration": [f],
            "gain": float(parameters) if f == "int8" else 0.0,
            "loss_mse": 1e-6 if f == "int8" else 0.0,
        }
        for order, parameters in linears.iter_rows()
        for f in (BASE, "int8")
    ]
    ops = groups.filter(pl.col("kind") == "linear")["op"].to_list()
    zeros = {"noise_model": "actual", "n_samples": 2, "loss_mse": 0.0, "kl": 0.0}
    sensitivity = [
        {"op": op, "operand": operand, "format": "int8", **zeros}
        for op in ops
        for operand in ("input", "weight")
    ]
    effects = [
        {"sample": i, "op": op, "format": "int8", "effect": effect}
        for k, op in enumerate(ops)
        for i, effect in enumerate(moves[min(k, len(moves) - 1)])
    ]
    loss = [{"n_samples": 1, "mean_square_loss": 4.0, "mean_loss": 2.0}]
    return {
        "objective": "m",
        "part": ObjectiveSpec(formats=("int8",)),
        "groups": store.write_table("groups", "g", groups),
        "gains": store.write_table("gains", "g", table("gains", gains)),
        "loss": store.write_table("loss", "g", table("loss", loss)),
        "sensitivity": store.write_table("sensitivity", "g", table("sensitivity", sensitivity)),
        "effects": store.write_table("effects", "g", table("effects", effects)),
        "timing": [],
        "limits": limits,
        "base": BASE,
        "solver": "auto",
        "fingerprint": "f",
        "provenance": {},
    }


def test_uniform_plans_are_made_once(tmp_path: Path) -> None:
    """Two τ, one uniform plan with the head and one without; a gain of memory has no error. Each plan and its row tell
    the loss MSE with signs: here of n weights that move one sample up and one down by 1 m nats, n² · 1e-6 nats²."""
    store = Store(tmp_path.as_uri())
    inputs = inputs_of(store, [Bound(tau=1e-4), Bound(tau=1.0)], [(1e-3, -1e-3)])
    with disable_run_logger():
        found = planning.solve.task.fn("solve", store.url, "k", inputs)
    solutions = read(found["solutions"])
    made = solutions.group_by("strategy").len().sort("strategy").rows()
    assert made == [
        ("ip_m", 2),
        ("prefix", 2),
        ("random", 2),
        ("uniform_int8", 1),
        ("uniform_int8_but_head", 1),
    ]
    assert solutions["predicted_gain_error"].null_count() == solutions.height
    plans = read_json(found["plan_files"])
    assert {p["predicted_gain_error"] for p in plans} == {None}
    expected = [1e-6 * sum(f == "int8" for f in p["formats"].values()) ** 2 for p in plans]
    assert [p["predicted_signed_mse"] for p in plans] == pytest.approx(expected)
    assert solutions["predicted_signed_mse"].to_list() == pytest.approx(expected)


def test_a_bound_with_signs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two weights whose effects cancel are lowered together, which no walk finds: each alone is over the bound. What plans
    predict, and what uniform plans are told by, is the loss MSE with signs. Two samples are few, which is told."""
    store, tau = Store(tmp_path.as_uri()), 1e-4
    moves = [(1e-3, -1e-3), (-1e-3, 1e-3), (0.5, 0.5)]
    inputs = inputs_of(store, [Bound(tau=tau, signed=True)], moves)
    with disable_run_logger(), caplog.at_level(logging.WARNING, "mpq"):
        found = planning.solve.task.fn("solve", store.url, "k", inputs)
    assert "with signs of 2 calibration samples for 8 decisions" in caplog.text
    plans = {p["strategy"]: p for p in read_json(found["plan_files"]) if p["seed"] == 0}
    lowered = {s: [f for f in p["formats"].values() if f == "int8"] for s, p in plans.items()}
    assert len(lowered["ip_m"]) == 2
    assert not lowered["prefix"]
    assert not lowered["random"]
    for plan in plans.values():
        assert plan["signed"]
        assert plan["predicted_loss_mse"] == pytest.approx(plan["predicted_signed_mse"], abs=1e-20)
    uniform = plans["uniform_int8"]
    n = len(lowered["uniform_int8"])
    assert uniform["budget"] == pytest.approx((0.5 * (n - 2)) ** 2)
    assert uniform["tau"] == pytest.approx(math.sqrt(uniform["budget"] / 4))
    assert plans["ip_m"]["budget"] == tau**2 * 4
    assert plans["ip_m"]["risk"] is None, "the errors of activations are not in these tables"
    with disable_run_logger(), pytest.raises(MpqError, match="needs the tables sensitivity and"):
        planning.solve.task.fn("other", store.url, "k", {**inputs, "effects": None})


def test_a_measured_gain_keeps_its_interval(tmp_path: Path) -> None:
    """The row of a plan's TTFT becomes four of the evaluation table, each beside base's TTFT."""
    store = Store(tmp_path.as_uri())
    row = {"ttft_s": 9e-3, "gain_s": 1.1e-3, "gain_ci_low_s": 1e-3, "gain_ci_high_s": 1.2e-3}
    ttft = store.write_table("plan_ttft", "t", pl.DataFrame([{**row, "base_ttft_s": 1e-2}]))
    plan = {
        "strategy": "ip_et",
        "objective": "et",
        "tau": 0.1,
        "seed": 0,
        "measured": [],
        "ttft": 0,
    }
    inputs = {"plans": [plan], "ttft": ttft}
    with disable_run_logger():
        found = evaluation.collect_evaluation.task.fn("collect", store.url, "k", inputs)
    table_of = read(found["evaluation"])
    assert dict(table_of.select("metric", "value").iter_rows()) == row
    assert table_of["base_value"].unique().to_list() == [1e-2]
