"""bench/peers: what all tools are asked and how their plans are compared, on a tiny model; no peer is installed for it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest
from small import ROOT, small_model

from mpq.evaluation.losses import divergences, losses
from mpq.models.blocks import Blocks
from mpq.models.loading import load_model
from mpq.running.apply import apply_plan


@pytest.fixture(scope="module")
def compare() -> Iterator[ModuleType]:
    before = set(sys.modules)
    sys.path[:0] = [str(ROOT / "bench" / "peers"), str(ROOT / "bench")]
    try:
        import compare

        yield compare
    finally:
        del sys.path[:2]
        for name in set(sys.modules) - before:
            if not name.startswith("mpq") and str(ROOT / "bench") in str(
                getattr(sys.modules[name], "__file__", "")
            ):
                del sys.modules[name]


OPS = {f"layers.{i}.{op}": n for i in range(2) for op, n in (("q", 10), ("k", 4), ("down", 16))}


def task_of(compare: ModuleType, ties: list[list[str]]) -> object:
    return compare.Task("", "", ["fp8_e4m3", "nvfp4"], [6.0, 8.0, 12.0], OPS, ties)


@pytest.mark.parametrize("ties", [[], [["layers.0.q", "layers.0.k"], ["layers.1.q", "layers.1.k"]]])
def test_allocation_is_the_cheapest(compare: ModuleType, ties: list[list[str]]) -> None:
    """No plan that keeps the ties and has as few bits costs less: all of them are tried."""
    task, draw = task_of(compare, ties), np.random.default_rng(0)
    costs = {
        (op, f): float(draw.uniform(1, 2) * n)
        for op in OPS
        for f, n in (("fp8_e4m3", 1), ("nvfp4", 5))
    }
    decisions = task.decisions()
    assert sorted(op for ops in decisions for op in ops) == sorted(OPS)
    every = [
        {op: f for ops, f in zip(decisions, chosen, strict=True) for op in ops}
        for chosen in itertools.product(["base", "fp8_e4m3", "nvfp4"], repeat=len(decisions))
    ]

    def cost(plan: dict[str, str]) -> float:
        return sum(costs.get((op, f), 0.0) for op, f in plan.items())

    for target in task.targets:
        plan = compare.allocated(task, costs, target)
        assert task.bits(plan) <= target
        assert cost(plan) == pytest.approx(min(cost(p) for p in every if task.bits(p) <= target))


def test_random_meets_its_target(compare: ModuleType) -> None:
    """Every draw has at most the bits that were asked for, keeps ties, and differs from another draw."""
    task = task_of(compare, [["layers.0.q", "layers.0.k"]])
    for target in task.targets:
        plans = [compare.drawn(task, target, seed) for seed in range(20)]
        assert all(task.bits(plan) <= target for plan in plans)
        assert all(plan["layers.0.q"] == plan["layers.0.k"] for plan in plans)
        assert len({tuple(plan.items()) for plan in plans}) > 1


def test_the_evaluator_measures_what_mpq_does(compare: ModuleType, tmp_path: Path) -> None:
    """KL, change of the loss and its square are those of mpq's own evaluation; base is as if nothing had been lowered."""
    small_model("llama", num_key_value_heads=2).save_pretrained(tmp_path)
    blocks = Blocks(np.random.default_rng(0).integers(0, 97, (5, 12)))
    model = load_model(tmp_path, "fp32")
    plan = {"model.layers.0.mlp.up_proj": "fp8_e4m3", "model.layers.1.self_attn.q_proj": "int8"}
    measured = compare.Evaluator(tmp_path, blocks)
    effect = measured.effect({**plan, "model.layers.0.mlp.down_proj": "base"})
    assert effect.kl == pytest.approx(
        divergences(model, plan, blocks, base="fp32").mean(), rel=1e-4
    )
    before = losses(model, blocks)
    with apply_plan(model, plan, base="fp32"):
        change = losses(model, blocks) - before
    assert effect.loss_mse == pytest.approx(np.square(change).mean(), rel=1e-4)
    assert effect.loss_change == pytest.approx(change.mean(), abs=1e-7)
    assert measured.effect({}).kl == 0
    assert measured.effect({}).perplexity == pytest.approx(np.exp(before.mean()), rel=1e-6)


def test_ratios_by_hand(compare: ModuleType) -> None:
    """mpq's KL over each tool's, and over the best peer's of each cell; plans over their target do not count."""
    kls = {"mpq": (2.0, 3.0), "higgs": (4.0, 3.0), "auto-round": (2.0, 1.0), "measured": (1.0, 3.0)}
    rows = [
        {
            "checkpoint": "c",
            "case": "menu, free",
            "target": float(target),
            "tool": tool,
            "kl": of[target],
            "over": tool == "auto-round" and target == 1,
        }
        for tool, of in kls.items()
        for target in (0, 1)
    ]
    told = compare.ratios(pl.DataFrame(rows))
    assert (told["higgs"]["median"], told["higgs"]["missed"]) == (0.75, 0)
    assert (told["auto-round"]["cells"], told["auto-round"]["largest"]) == (1, 1.0)
    assert (told["best peer"]["median"], told["best peer"]["largest"]) == (1.0, 1.0)
    assert (told["measured"]["largest"], told["measured"]["missed"]) == (2.0, 1)
    assert told["measured"]["at"] == ("c", "menu, free", 0.0)


def test_costs_of_searches_by_hand(compare: ModuleType) -> None:
    """A search is its scoring and one target's solving; mpq's stands over the fastest and the leanest of a case, which may
    be two tools. Tools that search nothing a user could buy, such as Random, are no measure."""
    searches = [
        {
            "checkpoint": "c",
            "case": "a",
            "tool": t,
            "score_cpu_s": s,
            "solve_cpu_s": 0.6,
            "peak_mb": mb,
        }
        for t, s, mb in (
            ("mpq", 1.9, 600.0),
            ("modelopt-gradient", 3.9, 800.0),
            ("auto-round", 5.9, 500.0),
            ("higgs", 0.1, 10.0),
        )
    ]
    told = compare.costs_of(searches)
    assert told["cpu_s"] == {
        "median": pytest.approx(0.5),
        "largest": pytest.approx(0.5),
        "cases": 1,
    }
    assert told["peak_mb"]["largest"] == pytest.approx(1.2)
    assert {of["tool"]: of["peak_mb"] for of in told["tools"]}["auto-round"] == 500.0


def test_the_picture_has_a_panel_a_case(compare: ModuleType) -> None:
    """A line for each tool, over mpq's KL at the same target; a plan over its target is in none."""
    from picture import panels

    kls = {"mpq": (2.0, 3.0), "higgs": (4.0, 3.0), "random": (8.0, 9.0)}
    rows = [
        {"checkpoint": "c", "case": case, "target": target, "tool": tool, "kl": of[target]}
        for case in ("free", "tied")
        for tool, of in kls.items()
        for target in (0, 1)
    ]
    plans = pl.DataFrame(rows).with_columns(over=(pl.col("tool") == "random") & (pl.col("kl") > 8))
    figure = panels(plans)
    assert [axes.get_title() for axes in figure.axes] == ["c, free", "c, tied"]
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[1].get_lines()}
    assert {tool: list(lines[tool]) for tool in kls} == {
        "mpq": [1, 1],
        "higgs": [2, 1],
        "random": [4],
    }
