"""Bounds and targets on the plans of a tiny Llama: sizes by hand, the least loss by brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import polars as pl
import pytest
from test_constraints import BASE, GROUPS, gains_of, resolved

from mpq.errors import MpqError
from mpq.program.changes import compare
from mpq.program.memory import effective_bits, weight_bytes
from mpq.program.plan import Plan
from mpq.program.prices import prices
from mpq.program.solver import NoPlan
from mpq.program.strategies import choose, least_loss_plan
from mpq.spec import BoundsSpec, TargetSpec

# few enough plans to try all: what is tied over all layers at once
FEW = resolved(
    tie=[["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"], ["*.gate_proj", "*.up_proj"]],
    pin={"*matmul": "base"},
)
HOW: dict[str, Any] = {"mean_square_loss": 4.0, "base": BASE}


def every_plan(gains: pl.DataFrame) -> list[tuple[dict[str, str], float, float]]:
    """Each plan of a gains table, with its gain and loss."""
    by_group = [part.rows(named=True) for _, part in gains.group_by("group", maintain_order=True)]
    return [
        (
            {op: f for r in rows for op, f in zip(r["ops"], r["configuration"], strict=True)},
            math.fsum(r["gain"] for r in rows),
            math.fsum(r["loss_mse"] for r in rows),
        )
        for rows in itertools.product(*by_group)
    ]


def test_sizes_by_hand() -> None:
    """INT8: a byte a weight and an FP32 scale an output channel; a head that is tied counts where it is lowered, as a copy."""
    down = GROUPS.filter(pl.col("op").str.ends_with("0.mlp.down_proj")).row(0, named=True)
    linears = GROUPS.filter(pl.col("kind") == "linear")
    n = linears["parameters"].sum()
    assert weight_bytes(GROUPS, {}, BASE) == 2 * n
    assert effective_bits(GROUPS, {}, BASE) == 16
    lowered = weight_bytes(GROUPS, {down["op"]: "int8"}, BASE)
    assert lowered == 2 * n - down["parameters"] + 4 * down["out_features"]
    head = linears.filter(pl.col("op") == "lm_head").row(0, named=True)
    tied = GROUPS.with_columns(tied=pl.col("op") == "lm_head")
    copied = weight_bytes(tied, {"lm_head": "int8"}, BASE)
    own = 2 * (n - head["parameters"])  # the embedding's in base
    assert weight_bytes(tied, {}, BASE) == own
    assert effective_bits(tied, {}, BASE) == 16
    assert copied == own + head["parameters"] + 4 * head["out_features"]
    assert weight_bytes(GROUPS, {"lm_head": "fp32"}, BASE) == 2 * n + 2 * head["parameters"]


@pytest.mark.parametrize("objective", ["et", "m"])
def test_the_least_loss_for_a_target(objective: str) -> None:
    """For bits, bytes and a time the smallest loss of all plans that meet it; τ is what that loss just meets."""
    gains = gains_of(objective, FEW)
    plans = every_plan(gains)
    targets: list[dict[str, float]] = [{"effective_bits": b} for b in (9.5, 12, 16)]
    targets += [{"weight_bytes": weight_bytes(GROUPS, plans[len(plans) // 3][0], BASE)}]
    if objective == "et":
        targets += [{"ttft_ms": 1e3 * (0.1 - plans[len(plans) // 2][1])}]
    for target in targets:
        plan, row = least_loss_plan(
            objective, GROUPS, gains, TargetSpec(**target), base_ttft_s=0.1, **HOW
        )
        ((name, limit),) = target.items()
        value = {
            "effective_bits": lambda p: effective_bits(GROUPS, p[0], BASE),
            "weight_bytes": lambda p: weight_bytes(GROUPS, p[0], BASE),
            "ttft_ms": lambda p: 1e3 * (0.1 - p[1]),
        }[name]
        least = min(loss for p in plans if value(p) <= limit * (1 + 1e-12) for loss in [p[2]])
        assert plan.predicted_loss_mse == pytest.approx(least, rel=1e-9, abs=1e-18)
        assert value((plan.formats, plan.predicted_gain)) <= limit * (1 + 1e-12)
        assert plan.tau == row["tau"] == pytest.approx(math.sqrt(plan.predicted_loss_mse / 4.0))
        assert plan.effective_bits == effective_bits(GROUPS, plan.formats, BASE)
        assert plan.name == f"{objective}-ip_loss"
        assert Plan.from_json(plan.to_json()) == plan


def test_bounds_hold_together() -> None:
    """Under τ, bits and shares at once the program's plan is the best of all; baselines note what they miss."""
    gains = gains_of("et", FEW)
    bounds = BoundsSpec(effective_bits=13, min_share={"int8": 0.3, "fp8_e4m3": 0.2})

    def keeps(formats: dict[str, str]) -> bool:
        taken = list(formats.values())
        return (
            effective_bits(GROUPS, formats, BASE) <= 13
            and taken.count("int8") >= 0.3 * len(taken)
            and taken.count("fp8_e4m3") >= 0.2 * len(taken)
        )

    for tau in (0.1, 0.3):
        plan, row = choose("ip_et", "et", GROUPS, gains, tau=tau, bounds=bounds, **HOW)
        best = max(g for f, g, d in every_plan(gains) if d <= tau**2 * 4.0 and keeps(f))
        assert plan.predicted_gain == pytest.approx(best, rel=1e-9)
        assert keeps(plan.formats)
        assert "Misses" not in row["note"]
    _, row = choose("prefix", "et", GROUPS, gains, tau=1e-5, bounds=bounds, **HOW)
    assert "Misses effective_bits" in row["note"]


def test_a_bound_that_no_plan_meets() -> None:
    """The bound is named with the least that can be had, alone and with τ; a time needs measured ones."""
    gains = gains_of("m", FEW)
    with pytest.raises(NoPlan, match=r"No plan keeps effective_bits ≤ 5: the nearest has .* 8\.\d"):
        choose("ip_m", "m", GROUPS, gains, tau=9.0, bounds=BoundsSpec(effective_bits=5), **HOW)
    with pytest.raises(NoPlan, match=r"loss MSE ≤ 4e-12 nats² and effective_bits ≤ 9 together"):
        choose("ip_m", "m", GROUPS, gains, tau=1e-6, bounds=BoundsSpec(effective_bits=9), **HOW)
    with pytest.raises(MpqError, match="needs measured times"):
        least_loss_plan("m", GROUPS, gains, TargetSpec(ttft_ms=1.0), **HOW)


def test_prices_are_what_the_program_gains_without() -> None:
    """Each constraint's price is the best of all plans that keep the others alone; a pin's by a table without it."""
    pinned = resolved(
        tie=[["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"], ["*.gate_proj", "*.up_proj"]],
        pin={"*matmul": "base", "*.down_proj": "base"},
    )
    gains, bounds, tau = gains_of("m", pinned), BoundsSpec(effective_bits=13), 0.2
    plan, _ = choose("ip_m", "m", GROUPS, gains, tau=tau, bounds=bounds, **HOW)
    made = prices(plan, GROUPS, gains, {"pin": gains_of("m", FEW)}, bounds=bounds)
    found = {row["constraint"]: row["gain_without"] for row in made}

    def best(table: pl.DataFrame, bits: float) -> float:
        return max(
            g
            for f, g, d in every_plan(table)
            if d <= tau**2 * 4.0 and effective_bits(GROUPS, f, BASE) <= bits
        )

    assert found["pin"] == pytest.approx(best(gains_of("m", FEW), 13))
    assert found["effective_bits ≤ 13"] == pytest.approx(best(gains, 16))
    assert plan.predicted_gain == pytest.approx(best(gains, 13))
    assert plan.predicted_gain < found["pin"]


def test_plans_without_a_tau_are_compared_too() -> None:
    """The least loss for a size is the same question after a new checkpoint, whatever τ it then just meets."""
    gains = gains_of("m", FEW)
    old, new = (
        least_loss_plan("m", GROUPS, gains, TargetSpec(effective_bits=b), **HOW)[0]
        for b in (10, 12)
    )
    (change,) = compare([old], [new])
    assert change.moved
    assert change.tau == new.tau != old.tau


def test_weights_of_which_no_tie_is_known_are_counted() -> None:
    """A groups table may leave `tied` empty: bytes and weights are then counted alike, as without the column."""
    free = GROUPS.drop("tied", strict=False)
    unknown = free.with_columns(tied=pl.lit(None, pl.Boolean))
    assert effective_bits(unknown, {}, BASE) == effective_bits(free, {}, BASE)
