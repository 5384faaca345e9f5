"""Designs, predictions and the loop of solving and measuring, on a simulated device whose groups are not additive."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import polars as pl
import pytest

from mpq.errors import MpqError
from mpq.program.gains import gains_et
from mpq.program.strategies import choose
from mpq.store.tables import table
from mpq.timing.design import (
    anchors,
    candidates,
    choices_of,
    complete,
    design,
    half_widths,
    interaction,
    neighbours,
    refine,
    standard_errors,
    sums,
    uncertain,
    unmeasured,
)

BASE, FORMATS = "bf16", ("fp8_e4m3", "int8")
N = 7  # ops in each group of the parallel block: 3^7 = 2187 configurations
GROUPS = 3


def groups() -> pl.DataFrame:
    """Three parallel blocks of seven linears each."""
    return table(
        "groups",
        [
            {
                "group": g,
                "order": g * N + i,
                "op": f"l.{g}.op{i}",
                "kind": "linear",
                "signature": "block",
                "in_features": 8,
                "out_features": 8,
                "macs": 1,
                "parameters": 64,
                "heads": 0,
                "kv_heads": 0,
            }
            for g in range(GROUPS)
            for i in range(N)
        ],
    )


def sensitivity() -> pl.DataFrame:
    """A loss MSE for each op and format, spread over two decades."""
    rng = np.random.default_rng(1)
    return table(
        "sensitivity",
        [
            {
                "op": f"l.{g}.op{i}",
                "operand": "weight",
                "format": f,
                "noise_model": "ulp",
                "n_samples": 1,
                "loss_mse": 10 ** rng.uniform(-8, -6),
                "sensitivity": 1.0,
            }
            for g in range(GROUPS)
            for i in range(N)
            for f in FORMATS
        ],
    )


class Device:
    """Seconds gained by one block: each op's own, a bonus for neighbours lowered together, a toll for mixing formats."""

    def __init__(self, noise_s: float = 0.0):
        rng = np.random.default_rng(0)
        self.own = {(i, f): rng.uniform(1e-4, 1e-3) for i in range(N) for f in FORMATS}
        self.noise, self.rng, self.asked = noise_s, rng, list[tuple[str, ...]]()

    def gain(self, configuration: tuple[str, ...]) -> float:
        lowered = [f != BASE for f in configuration]
        own = sum(self.own.get((i, f), 0.0) for i, f in enumerate(configuration))
        together = 2e-4 * sum(a and b for a, b in itertools.pairwise(lowered))
        return own + together - 1e-4 * (len({f for f in configuration if f != BASE}) > 1)

    def measure(self, wanted: list[tuple[str, tuple[str, ...]]]) -> pl.DataFrame:
        rows: list[dict[str, object]] = []
        for signature, c in wanted:
            self.asked.append(c)
            gain = 0.0 if set(c) == {BASE} else self.gain(c) + self.rng.normal(0, self.noise)
            rows.append(
                {
                    "signature": signature,
                    "group": 0,
                    "configuration": list(c),
                    "instances": GROUPS,
                    "repeats": 7,
                    "ttft_s": 0.1 - GROUPS * gain,
                    "base_ttft_s": 0.1,
                    "gain_s": gain,
                    "gain_ci_low_s": gain,
                    "gain_ci_high_s": gain,
                    "device": "simulated",
                    "method": "signature",
                    "batch": 1,
                    "length": 1,
                    "load_average": 0.0,
                    "steal_share": 0.0,
                    "disturbed": 0,
                    "order_measured": 0,
                    "significant": True,
                }
            )
        return table("timing", rows)


CHOICES = {"block": choices_of(groups().filter(pl.col("group") == 0), {"linear": FORMATS}, BASE)}


def test_a_design_holds_what_a_model_needs() -> None:
    """Everything where that is few; else all-base first, each single change, each format throughout, and no more than asked."""
    assert design(CHOICES["block"][:3], 64) == list(itertools.product(*CHOICES["block"][:3]))
    some = design(CHOICES["block"], 64)
    assert len(some) == len(set(some)) == 64
    assert some[0] == (BASE,) * N
    assert {
        tuple(f if i == j else BASE for j in range(N)) for i in range(N) for f in FORMATS
    } <= set(some)
    assert {(f,) * N for f in FORMATS} <= set(some)
    assert design(CHOICES["block"], 64) == some


def test_completed_tables_hold_every_candidate() -> None:
    """A row for each configuration, predicted ones with no repeats and an interval."""
    device = Device()
    full = complete(
        device.measure([("block", c) for c in design(CHOICES["block"], 60)]), CHOICES, BASE
    )
    assert full.height == 3**N == len(candidates(CHOICES["block"], []))
    guessed = full.filter(pl.col("predicted"))
    assert guessed.height == 3**N - 60
    assert (guessed["gain_ci_low_s"] < guessed["gain_s"]).all()
    assert complete(full, CHOICES, BASE).height == 3**N
    np.testing.assert_allclose(
        full["pooled_gain_s"], full["gain_s"], atol=1e-6
    )  # nothing to doubt in gains that are certain


def test_no_lowered_gain_is_certain_by_luck() -> None:
    """Nine of ten gains are known to ± 1 ms; one, 17 ms where its neighbours say 2, has an interval of no width: it is doubted too."""
    device = Device()
    timing = device.measure([("block", c) for c in design(CHOICES["block"], 120)])
    lucky = timing["configuration"].to_list().index(["int8", *[BASE] * (N - 1)])
    half = np.full(timing.height, 1e-3) * (np.arange(timing.height) != 0)
    half[lucky] = 0.0
    gain = timing["gain_s"].to_numpy().copy()
    gain[lucky] = 17e-3
    timing = timing.with_columns(
        pl.Series("gain_s", gain),
        pl.Series("gain_ci_low_s", gain - half),
        pl.Series("gain_ci_high_s", gain + half),
    )
    errors = standard_errors(timing, BASE)
    assert errors[0] == 0
    assert errors[lucky] == pytest.approx(np.median(errors) / 2)
    more = standard_errors(timing.with_columns(repeats=pl.lit(100)), BASE)
    assert (errors[1:] < more[1:]).all(), "an interval of seven pairs is wider than 1.96 errors"
    full = complete(timing, CHOICES, BASE)
    assert full["pooled_gain_s"][lucky] < 17e-3
    assert full["pooled_error_s"][lucky] > 1e-4
    with pytest.raises(MpqError, match="no pooled gains"):
        gains_et(groups(), timing, sensitivity(), BASE, "ulp", "pooled")


def test_what_may_no_longer_be_chosen_is_left_out() -> None:
    """Measured in INT8 as well, and now to be planned in FP8 alone: no row of a completed table has INT8."""
    timing = Device().measure([("block", c) for c in design(CHOICES["block"], 60)])
    narrow = complete(timing, {"block": [(BASE, "fp8_e4m3")] * N}, BASE)
    assert narrow.height == 2**N
    assert set(narrow["configuration"].explode()) == {BASE, "fp8_e4m3"}
    assert complete(timing.clear(), CHOICES, BASE).is_empty()


def test_pooled_gains_are_nearer_the_truth_than_noisy_measurements() -> None:
    """Of 200 gains, each known to ± 0.3 ms, the largest is too large by far; pooled, what is promised is there."""
    device = Device(noise_s=1.5e-4)
    timing = device.measure([("block", c) for c in design(CHOICES["block"], 200)])
    some = pl.col("configuration").list.unique().list.len() > 1
    half = pl.when(some | (pl.col("configuration").list.first() != BASE)).then(3e-4).otherwise(0.0)
    timing = timing.with_columns(
        gain_ci_low_s=pl.col("gain_s") - half, gain_ci_high_s=pl.col("gain_s") + half
    )
    full = complete(timing, CHOICES, BASE)
    measured = full.filter(~pl.col("predicted"))
    truth = np.array(
        [device.gain(tuple(c)) if set(c) != {BASE} else 0.0 for c in measured["configuration"]]
    )
    error = {
        name: float(np.sqrt(np.mean((measured[name].to_numpy() - truth) ** 2)))
        for name in ("gain_s", "pooled_gain_s")
    }
    assert error["pooled_gain_s"] < 0.6 * error["gain_s"]
    pooled, raw = (
        gains_et(groups(), full, sensitivity(), BASE, "ulp", bound)
        for bound in ("pooled", "median")
    )
    assert pooled.filter(pl.col("group") == 0)["gain"].to_list() == pytest.approx(
        [
            0.0 if set(c) == {BASE} else g
            for c, g in full.select("configuration", "pooled_gain_s").iter_rows()
        ]
    )
    assert raw["gain"].max() == full["gain_s"].max()


def test_the_least_certain_gains_are_measured_next() -> None:
    """What is asked for is unmeasured, worst first; measured, it tells more than as many at random; once all is known, nothing is asked."""
    device, choices = Device(), CHOICES["block"][:5]
    start = device.measure([("block", c) for c in design(choices, 16)])
    at_random = device.measure([("block", c) for c in design(choices, 40)])
    timing = start
    for _ in range(3):
        wanted = uncertain(timing, {"block": choices}, BASE, 1e-3, 8)
        assert len(wanted) == 8
        assert not {c for _, c in wanted} & {tuple(c) for c in timing["configuration"]}
        timing = pl.concat([timing, device.measure(wanted)])
    errors = []
    for of in (timing, at_random):
        full = complete(of, {"block": choices}, BASE)
        truth = np.array([device.gain(tuple(c)) for c in full["configuration"]])
        errors.append(float(np.sqrt(np.mean((full["pooled_gain_s"].to_numpy() - truth) ** 2))))
    assert errors[0] < 1.1 * errors[1]
    assert uncertain(timing, {"block": choices}, BASE, 0.5, 8) == []


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_loop_ends_with_everything_chosen_measured(share: float) -> None:
    """Few measurements, a plan whose gains are all measured, and nearly the gain of measuring everything."""
    table_, losses = groups(), sensitivity()
    total = losses["loss_mse"].sum() / 2

    def plan_of(timing: pl.DataFrame) -> dict[str, str]:
        gains = gains_et(table_, timing, losses, BASE, "ulp")
        return choose(
            "ip_et", "et", table_, gains, tau=share, mean_square_loss=total / share, base=BASE
        )[0].formats

    device = Device()
    start = device.measure([("block", c) for c in design(CHOICES["block"], 60)])

    def chosen(timing: pl.DataFrame) -> list[tuple[str, tuple[str, ...]]]:
        return unmeasured(timing, table_, [plan_of(complete(timing, CHOICES, BASE))], BASE)

    timing, rounds = refine(
        start, chosen, lambda timing, wanted: pl.concat([timing, device.measure(wanted)]), 8
    )
    assert rounds < 8
    plan = plan_of(complete(timing, CHOICES, BASE))
    assert not unmeasured(timing, table_, [plan], BASE)
    everything = Device().measure([("block", c) for c in itertools.product(*CHOICES["block"])])
    best = plan_of(everything)
    gain = [
        sum(device.gain(tuple(p[f"l.{g}.op{i}"] for i in range(N))) for g in range(GROUPS))
        for p in (plan, best)
    ]
    assert gain[0] >= 0.97 * gain[1]
    assert len(set(device.asked)) < 3**N / 20


def test_anchors_are_the_fastest_plan_and_everything_in_each_format() -> None:
    """Each group at its best; then as many ops as possible in each format, base elsewhere; none twice."""
    gains = gains_et(
        groups(),
        Device().measure([("block", c) for c in design(CHOICES["block"], 60)]),
        sensitivity(),
        BASE,
        "ulp",
    )
    plans = anchors(groups(), gains, BASE)
    totals = sums(groups(), gains, plans, BASE)
    assert totals[0] == pytest.approx(
        gains.group_by("group").agg(pl.col("gain").max())["gain"].sum()
    )
    assert all(len(plan) == N * GROUPS for plan in plans)
    assert all(plan[f"l.0.op{i}"] == plan[f"l.2.op{i}"] for plan in plans for i in range(N))
    formats = sorted({f for c in CHOICES["block"] for f in c} - {BASE})
    assert [set(plan.values()) for plan in plans if len(set(plan.values())) == 1] == [
        {f} for f in formats
    ]
    nothing = gains.filter(pl.col("configuration").list.eval(pl.element() == BASE).list.all())
    assert anchors(groups(), nothing, BASE) == []


def test_half_widths_add_up_where_one_measurement_serves_several_groups() -> None:
    """By hand: two blocks in one configuration err alike (2 x 3 ms), a third in another errs apart (4 ms); base errs nowhere."""
    device = Device()
    everything, first = ("int8",) * N, ("int8", *[BASE] * (N - 1))
    timing = device.measure([("block", (BASE,) * N), ("block", everything), ("block", first)])
    widths = pl.Series([0.0, 3e-3, 4e-3])
    timing = timing.with_columns(
        gain_ci_low_s=pl.col("gain_s") - widths, gain_ci_high_s=pl.col("gain_s") + widths
    )
    plan = {f"l.{g}.op{i}": "int8" for g in (0, 1) for i in range(N)}
    got = half_widths(groups(), timing, [{}, plan, plan | {"l.2.op0": "int8"}], BASE)
    np.testing.assert_allclose(got, [0.0, 6e-3, math.hypot(6e-3, 4e-3)])
    with pytest.raises(KeyError):
        half_widths(groups(), timing, [{"l.0.op1": "int8"}], BASE)


def test_neighbours_are_groups_in_a_row_in_one_lowered_format() -> None:
    """Of three groups in a row: two pairs in all; none with base or another format between; shares multiply."""
    every = {f"l.{g}.op{i}": "int8" for g in range(GROUPS) for i in range(N)}
    count = partial(neighbours, groups(), base=BASE)
    assert count(every) == GROUPS - 1
    assert count({op: f for op, f in every.items() if not op.startswith("l.1.")}) == max(
        GROUPS - 3, 0
    )
    assert count(
        {op: f for op, f in every.items() if op.startswith("l.0.") or op == "l.1.op0"}
    ) == pytest.approx(1 / N)
    assert count({op: "fp8_e4m3" if op.startswith("l.1.") else f for op, f in every.items()}) == 0
    assert count(dict.fromkeys(every, BASE)) == count({}) == 0


def test_interaction_explains_what_was_measured() -> None:
    """Of plans that gain 1 ms a pair it is 1 ms; of one plan it explains that one; noise averages out; of nothing it is 0."""
    pairs, totals = np.array([0.0, 4.0, 16.0]), np.array([0.01, -0.02, 0.05])
    assert interaction(pairs, totals, totals + 1e-3 * pairs) == pytest.approx(1e-3)
    assert interaction([8], [0.05], [0.06]) * 8 == pytest.approx(0.01)
    assert interaction(pairs, totals, totals + 1e-3 * pairs + [1e-4, -1e-4, 1e-5]) == pytest.approx(
        1e-3, rel=0.05
    )
    assert interaction([], [], []) == interaction([0.0], [0.1], [0.2]) == 0.0
