"""Predictions that measured plans correct, bounds at a probability, and which plan is delivered."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import polars as pl
import pytest

from mpq.errors import MpqError
from mpq.program.anchors import Measured, Scale, corrected, fitted, measured_of, scaled
from mpq.program.certainty import held_at, risk
from mpq.program.checking import delivered
from mpq.program.plan import Plan
from mpq.program.strategies import choose
from mpq.store.tables import table

GROUPS = table(
    "groups",
    [
        {
            "group": i,
            "order": i,
            "op": f"model.layers.{i}.down_proj",
            "kind": "linear",
            "signature": "s",
            "in_features": 8,
            "out_features": 8,
            "macs": 64,
            "parameters": 64,
        }
        for i in range(8)
    ],
)
GAINS = table(
    "gains",
    [
        {
            "objective": "m",
            "group": i,
            "configuration": [f],
            "gain": (1.0 + i / 10) * (f != "fp32"),
            "loss_mse": 1e-6 * (f != "fp32"),
            "loss_mse_stderr": 1e-7 * (f != "fp32"),
            "kl": 1e-3 * (1 + i) * (f != "fp32"),
            "kl_stderr": 1e-4 * (1 + i) * (f != "fp32"),
        }
        for i in range(8)
        for f in ("fp32", "int8")
    ],
)
HOW = {"mean_square_loss": 4.0, "base": "fp32"}


def plan_of(kl: float, scale: Scale = Scale(), robust: float | None = None) -> Plan:
    return choose("ip_m", "m", GROUPS, GAINS, kl=kl, scale=scale, robust=robust, **HOW)[0]


def test_the_scale_of_measured_plans() -> None:
    """Plans that measure 1.2 times what was predicted, ± 5 %, give that scale and an error of about 5 %; no plan gives 1."""
    draw = random.Random(0)
    plans = [Measured({}, 1e-3, 1.2e-3 * math.exp(draw.gauss(0, 0.05)), 0.0) for _ in range(200)]
    scale = fitted(plans)
    assert scale.value == pytest.approx(1.2, rel=0.02)
    assert scale.error == pytest.approx(0.05, rel=0.15)
    assert fitted(plans[:1]).error > scale.error  # one plan tells little of the spread
    assert fitted([Measured({}, 0.0, 0.0, 0.0)]) == Scale(1.0, 0.1)


def test_one_anchor_that_is_off_moves_the_error_alone() -> None:
    """Of six plans one measures 2.4 times what the others do: the scale is theirs, and its error says that plans stray."""
    plans = [Measured({}, 1e-3, kl, 0.0) for kl in (1.0e-3, 1.01e-3, 1.03e-3, 1.04e-3, 1.05e-3)]
    scale = fitted([*plans, Measured({}, 1e-3, 2.4e-3, 0.0)])
    assert scale.value == pytest.approx(1.035, abs=0.01)
    assert scale.error > 3 * fitted(plans).error


def test_a_robust_bound_holds_at_its_probability() -> None:
    """A plan whose prediction is drawn anew from its error breaks a robust bound in at most that share of the draws."""
    draw = random.Random(1)
    for robust in (0.8, 0.95):
        plan = plan_of(0.02, robust=robust)
        assert plan.predicted_kl is not None
        kl, error = plan.predicted_kl, plan.predicted_kl_error / 1.96
        broken = sum(draw.gauss(kl, error) > 0.02 for _ in range(20_000)) / 20_000
        assert broken <= 1 - robust + 0.01
        assert plan.risk == pytest.approx(broken, abs=0.01)
    assert plan_of(0.02).predicted_gain > plan_of(0.02, robust=0.95).predicted_gain
    assert risk({"kl": (0.0, 0.0)}, {"kl": 1.0}) == 0
    assert risk({"kl": (2.0, 0.0)}, {"kl": 1.0}) == 1
    assert risk({"kl": (2.0, None)}, {"kl": 1.0}) is None


def test_errors_that_are_not_known_are_told() -> None:
    """A robust bound asks for standard errors."""
    with pytest.raises(MpqError, match="needs the standard error of kl"):
        held_at(GAINS.drop("kl_stderr"), 0.9, {"kl": 1.0})


def test_a_scale_is_in_prediction_and_program() -> None:
    """Under twice the KL the plan is that of half the bound, its prediction twice the sum; the scale's error adds to its own."""
    scale = Scale(2.0, 0.1, 5)
    plan, half = plan_of(0.02, scale), plan_of(0.01)
    assert plan.formats == half.formats
    assert plan.predicted_kl == pytest.approx(2 * half.predicted_kl)
    error = 1.96 * (2 * half.predicted_kl * 0.1 + 2 * half.predicted_kl_error / 1.96)
    assert plan.predicted_kl_error == pytest.approx(error)
    assert (plan.kl_scale, plan.kl_scale_error) == (2.0, 0.1)
    assert scaled(GAINS, Scale()).equals(GAINS)


def test_correcting_until_the_bound_holds() -> None:
    """A truth far from the prediction, in another way for each op: rounds of measuring and correcting end inside the bound."""
    true = {op: 1e-3 * (1 + i) * (3.0 if i % 2 else 1.5) for i, op in enumerate(GROUPS["op"])}

    def measure(plan: Plan) -> Measured:
        predicted = sum(1e-3 * (1 + list(true).index(op)) for op in plan.lowered)
        return Measured(plan.formats, predicted, sum(true[op] for op in plan.lowered), 0.0)

    bound, scale, rounds, measured = 0.0301, Scale(), [], []
    for _ in range(6):
        rounds.append([plan_of(bound, scale)])
        measured.append(measure(rounds[-1][0]))
        scale = corrected(scale, measured[-1], bound, None)
    assert measured[0].kl > bound
    assert measured[-1].kl <= bound
    plan = delivered(rounds[-1][0], rounds, measured, None, "some text")
    inside = [p.predicted_gain for (p,), m in zip(rounds, measured, strict=True) if m.kl <= bound]
    assert plan.predicted_gain == max(inside)
    assert plan.checked_kl == measure(plan).kl <= bound
    assert plan.risk == 0
    assert plan.provenance["check"]["text"] == "some text"
    assert len(plan.provenance["check"]["rounds"]) == 6


def test_scales_go_by_the_plan_chosen_last() -> None:
    """Over its bound a plan sets a larger scale, far inside a smaller one, near the bound none, and never the wrong way."""
    scale = Scale(1.2, 0.1, 3)

    def after(kl: float, predicted: float = 1.0) -> float:
        return corrected(scale, Measured({}, predicted, kl, 0.0), 1.0, None).value

    assert after(1.5) == 1.5
    assert after(1.05) == 1.2  # over the bound, yet below what the scale says already
    assert after(0.95) == 1.2
    assert after(0.5) == 0.5
    assert after(0.5, 0.2) == 1.2
    assert after(0.0, 0.0) == 1.2
    robust = corrected(scale, Measured({}, 1.0, 0.95, 0.4), 1.0, 0.95)
    assert robust.value == pytest.approx(0.95 + 0.4 * NormalDist().inv_cdf(0.95))


def test_a_plan_that_stays_outside_says_so() -> None:
    """Where no measured plan is inside, the last one is delivered, with what it measured and that its bound is broken."""
    plan = plan_of(0.02)
    found = delivered(plan, [[plan]], [Measured(plan.formats, 0.02, 0.05, 1e-3)], 0.95, "text")
    assert found.formats == plan.formats
    assert found.checked_kl == 0.05
    assert "times its bound" in found.provenance["check"]["note"]
    assert found.risk > 0.99


def test_an_earlier_plan_is_delivered_under_the_last_scale() -> None:
    """A plan of the first round that measures inside gains more than the last one: it is delivered, its KL predicted anew."""
    first, last = plan_of(0.02), plan_of(0.02, Scale(2.0, 0.1))
    measured = [Measured(p.formats, k, 0.015, 0.0) for p, k in ((first, 0.02), (last, 0.01))]
    found = delivered(last, [[first], [last]], measured, None, "text")
    assert found.formats == first.formats
    again = choose("ip_m", "m", GROUPS, GAINS, kl=0.04, scale=Scale(2.0, 0.1), **HOW)[0]
    assert found.predicted_kl == pytest.approx(2 * first.predicted_kl)
    if again.formats == found.formats:
        assert found.predicted_kl_error == pytest.approx(again.predicted_kl_error)


def test_what_blocks_say_of_a_plan() -> None:
    """The mean over blocks, its standard error, and what the KL is below at a probability."""
    measured = measured_of({"a": "int8"}, 1.0, [1.0, 2.0, 3.0, 4.0])
    spread = pl.Series([1.0, 2.0, 3.0, 4.0]).std()
    assert (measured.kl, measured.error) == (2.5, pytest.approx(spread / 2))
    assert measured.at_most(None) == 2.5
    assert measured.at_most(0.95) == pytest.approx(2.5 + NormalDist().inv_cdf(0.95) * spread / 2)


def test_one_block_keeps_no_bound_at_a_probability() -> None:
    """What was measured on one block of text has no known error: none is told, and nothing is held at a probability."""
    one = measured_of(plan_of(0.02).formats, 0.02, [0.015])
    found = delivered(plan_of(0.02), [[plan_of(0.02)]], [one], None, "text")
    assert (found.checked_kl, found.checked_kl_error, found.risk) == (0.015, None, None)
    with pytest.raises(MpqError, match=r"evaluation\.samples to 2"):
        one.at_most(0.95)
