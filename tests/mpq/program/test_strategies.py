"""Plans: within their bound, better with more of it, and the program at least as good as the baselines."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import polars as pl
import pytest
from small import llama_groups

from mpq.errors import MpqError
from mpq.program.gains import gains_et, gains_m, gains_tt, solve_table
from mpq.program.strategies import choose, gain_errors, uniform_plans
from mpq.store.tables import table
from mpq.timing.design import choices_of

FORMATS = ["bf16", "fp8_e4m3"]
GROUPS = llama_groups(2, 16)


def sensitivity() -> pl.DataFrame:
    """Losses that differ by op over six orders of magnitude."""
    noise = {"fp32": 0.0, "bf16": 1e-4, "fp8_e4m3": 1.0}
    return table(
        "sensitivity",
        [
            {
                "op": op,
                "operand": o,
                "format": f,
                "noise_model": "ulp",
                "n_samples": 1,
                "loss_mse": n * 10.0 ** -(3 + (7 * i) % 11 / 2),
                "sensitivity": 0.0,
            }
            for i, op in enumerate(GROUPS["op"])
            for o in ("input", "weight")
            for f, n in noise.items()
        ],
    )


def timing() -> pl.DataFrame:
    """Measured gains: more for lower formats, less than additive, some below zero."""
    rows = []
    for (signature,), part in GROUPS.group_by(["signature"], maintain_order=True):
        first = part.filter(pl.col("group") == part["group"].min())
        for c in itertools.product(
            *choices_of(first, {"linear": FORMATS, "bgemm": ["bf16"]}, "fp32")
        ):
            gain = math.sqrt(
                sum({"fp32": 0, "bf16": 1, "fp8_e4m3": 2}[f] for f in c)
            ) * 1e-4 - 1e-5 * (c[-1] == "bf16")
            rows.append(
                {
                    "signature": signature,
                    "group": part["group"].min(),
                    "configuration": list(c),
                    "gain_s": gain,
                    "gain_ci_low_s": gain - 1e-5,
                    "gain_ci_high_s": gain + 1e-5,
                    "instances": 2,
                    "repeats": 3,
                    "ttft_s": 0.1,
                    "base_ttft_s": 0.1,
                    "device": "d",
                    "method": "signature",
                    "batch": 2,
                    "length": 16,
                    "load_average": 0.0,
                    "steal_share": 0.0,
                }
            )
    return table("timing", rows)


def tables(objective: str) -> pl.DataFrame:
    """The gains table of an objective."""
    if objective == "et":
        return gains_et(GROUPS, timing(), sensitivity(), "fp32", "ulp")
    return (gains_tt if objective == "tt" else gains_m)(
        GROUPS, sensitivity(), FORMATS, "fp32", "ulp"
    )


@pytest.mark.parametrize("objective", ["et", "tt", "m"])
def test_bounds_and_order(objective: str) -> None:
    """Every plan keeps its budget in float64, gains grow with τ, and the program is never behind a baseline."""
    gains = tables(objective)
    last = -math.inf
    for tau in (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0):
        plans = {
            (s, seed): choose(
                s, objective, GROUPS, gains, tau=tau, mean_square_loss=4.0, base="fp32", seed=seed
            )[0]
            for s, seed in ((f"ip_{objective}", 0), ("prefix", 0), ("random", 0), ("random", 1))
        }
        best = plans[f"ip_{objective}", 0]
        assert all(p.predicted_loss_mse <= p.budget == tau**2 * 4.0 for p in plans.values())
        assert all(best.predicted_gain >= p.predicted_gain * (1 - 1e-12) for p in plans.values())
        assert best.predicted_gain >= last
        last = best.predicted_gain
        if objective == "m":
            assert not any(op.endswith("matmul") for op in best.formats)
    assert plans["prefix", 0].share_lowered == 1.0


def test_random_is_seeded() -> None:
    """One seed, one plan; another seed, another order."""
    gains = tables("tt")
    one, again, other = (
        choose("random", "tt", GROUPS, gains, tau=0.01, mean_square_loss=4.0, base="fp32", seed=s)[
            0
        ].formats
        for s in (0, 0, 1)
    )
    assert one == again != other


def test_prediction_is_base_less_gain() -> None:
    """IP-ET predicts TTFT; `lower` plans with the interval's lower end."""
    plan, row = choose(
        "ip_et",
        "et",
        GROUPS,
        tables("et"),
        tau=1.0,
        mean_square_loss=4.0,
        base="fp32",
        base_ttft_s=0.1,
    )
    assert plan.predicted_ttft_s == row["predicted_ttft_s"] == 0.1 - plan.predicted_gain
    assert "cannot be" not in row["note"]
    facts = {"mean_square_loss": 4.0, "base": "fp32", "base_ttft_s": 1.01 * plan.predicted_gain}
    _, doubtful = choose("ip_et", "et", GROUPS, tables("et"), tau=1.0, **facts)
    assert "The predicted TTFT of" in doubtful["note"]
    assert "cannot be" in doubtful["note"]
    lower = gains_et(GROUPS, timing(), sensitivity(), "fp32", "ulp", "lower")
    assert lower["gain"].sum() < tables("et")["gain"].sum()
    assert (
        lower.filter(
            pl.col("configuration").list.unique().list.len() == 1,
            pl.col("configuration").list.first() == "fp32",
        )["gain"].sum()
        == 0
    )


def test_a_doubtful_gain_counts_at_its_lower_end() -> None:
    """`cautious` takes a gain whose interval includes zero at the interval's lower end, every other as it is."""
    doubtful = timing().with_columns(significant=pl.int_range(pl.len()) % 2 == 0)
    median, lower, cautious = (
        gains_et(GROUPS, doubtful, sensitivity(), "fp32", "ulp", b)["gain"]
        for b in ("median", "lower", "cautious")
    )
    assert set(cautious - median) | set(cautious - lower) > {0.0}
    assert all(c in (m, low) for c, m, low in zip(cautious, median, lower, strict=True))


def test_a_format_that_loses_time_is_left_alone() -> None:
    """However much loss is allowed, the program lowers nothing to what is slower than base."""
    slower = timing().with_columns(gain_s=-pl.col("gain_s").abs())
    gains = gains_et(GROUPS, slower, sensitivity(), "fp32", "ulp")
    plan, _ = choose("ip_et", "et", GROUPS, gains, tau=1e6, mean_square_loss=4.0, base="fp32")
    assert plan.share_lowered == 0


def test_theoretical_gains_by_hand() -> None:
    """Δ_f · MACs in BF16 MACs (eq. 28), bytes of weights (29, 30) less those of scales."""
    op = GROUPS.row(0, named=True)
    tt = {
        tuple(r["configuration"]): r["gain"]
        for r in tables("tt").filter(group=0).iter_rows(named=True)
    }
    assert tt == {("fp32",): 0.0, ("bf16",): op["macs"], ("fp8_e4m3",): 1.5 * op["macs"]}
    m = {
        tuple(r["configuration"]): r["gain"]
        for r in tables("m").filter(group=0).iter_rows(named=True)
    }
    assert m == {
        ("fp32",): 0.0,
        ("bf16",): 2.0 * op["parameters"],
        ("fp8_e4m3",): 3.0 * op["parameters"] - 4 * op["out_features"],
    }


@pytest.mark.parametrize("objective", ["et", "tt", "m"])
def test_uniform_plans(objective: str) -> None:
    """A plan for each format, with the head and without: what can take the format does, the rest is
    base; gain and loss are sums over the ops, and τ is where the predicted loss just meets τ² E[g²]."""
    gains = tables(objective)
    made = uniform_plans(objective, GROUPS, gains, mean_square_loss=4.0, base="fp32")
    plans = {plan.strategy: plan for plan, _ in made}
    assert set(plans) == {f"uniform_{f}{end}" for f in FORMATS for end in ("", "_but_head")}
    kinds = dict(GROUPS.select("op", "kind").iter_rows())
    for name, plan in plans.items():
        f = name.removeprefix("uniform_").removesuffix("_but_head")
        for op, given in plan.formats.items():
            bgemm_in_fp8 = kinds[op] == "bgemm" and f == "fp8_e4m3" and objective == "et"
            kept = bgemm_in_fp8 or (name.endswith("_but_head") and op == "lm_head")
            assert given == ("fp32" if kept else f), op
        per_op = sensitivity().group_by("op", "format").agg(pl.col("loss_mse").sum())
        losses = {(op, g): loss for op, g, loss in per_op.iter_rows()}
        d = sum(losses[op, given] for op, given in plan.formats.items())
        assert plan.predicted_loss_mse == plan.budget == pytest.approx(d)
        assert plan.tau == pytest.approx(math.sqrt(d / 4.0))
    assert {row["status"] for _, row in made} == {"heuristic"}
    assert {row["strategy"] for _, row in made} == set(plans)
    head = GROUPS.filter(pl.col("op") == "lm_head").row(0, named=True)
    lost = plans["uniform_bf16"].predicted_gain - plans["uniform_bf16_but_head"].predicted_gain
    if objective != "et":
        assert lost == {"tt": head["macs"], "m": 2 * head["parameters"]}[objective]


def test_a_head_that_cannot_be_lowered_needs_no_second_plan() -> None:
    """Where the head stays in base anyway, or is all that can be lowered, there is one plan a format."""
    gains = tables("m")
    head = GROUPS.filter(pl.col("op") == "lm_head")["order"][0]
    kept = gains.filter((pl.col("group") != head) | (pl.col("gain") == 0))
    only = gains.filter((pl.col("group") == head) | (pl.col("gain") == 0))
    for frame in (kept, only):
        made = uniform_plans("m", GROUPS, frame, mean_square_loss=4.0, base="fp32")
        assert [p.strategy for p, _ in made] == ["uniform_bf16", "uniform_fp8_e4m3"]


def test_a_plan_says_how_sure_its_gain_is() -> None:
    """Half widths of ± 10 µs a signature: groups that share a measurement err alike, others apart;
    None where a configuration was not timed, and where no time is gained."""
    (one, _), *_ = uniform_plans("et", GROUPS, tables("et"), mean_square_loss=4.0, base="fp32")
    counts = GROUPS.unique("group")["signature"].value_counts()["count"].to_list()
    (error,) = gain_errors(GROUPS, timing(), [one])
    assert error == pytest.approx(math.hypot(*(n * 1e-5 for n in counts)))
    assert gain_errors(GROUPS, timing(), [replace(one, objective="tt")]) == [None]
    half = timing().filter(pl.col("configuration").list.contains("fp32"))
    assert gain_errors(GROUPS, half, [one]) == [None]


def with_kl() -> pl.DataFrame:
    """The sensitivities with rows of the rounding that happens, whose KL orders ops in another way than the loss does."""
    actual = sensitivity().with_columns(
        noise_model=pl.lit("actual"),
        kl=pl.col("loss_mse") * 10.0 ** (pl.int_range(pl.len()) % 5),
        kl_stderr=pl.col("loss_mse") / 10,
    )
    return pl.concat([sensitivity(), actual])


@pytest.mark.parametrize("strategy", ["ip_tt", "prefix", "random"])
def test_kl_is_bounded(strategy: str) -> None:
    """A plan under κ predicts a KL within it, the sum over its ops, and says so; with τ as well it keeps both."""
    gains = gains_tt(GROUPS, with_kl(), FORMATS, "fp32", "ulp")
    rows = with_kl().filter(pl.col("noise_model") == "actual")
    per_op = rows.group_by("op", "format").agg(pl.col("kl", "kl_stderr").sum())
    kls = {(op, f): (kl, e) for op, f, kl, e in per_op.iter_rows()}
    options = {"mean_square_loss": 4.0, "base": "fp32"}
    for kl in (1e-3, 0.1, 1.0):
        plan, row = choose(strategy, "tt", GROUPS, gains, kl=kl, **options)
        own = [kls[op, f] for op, f in plan.formats.items() if f != "fp32"]
        assert plan.predicted_kl == row["predicted_kl"] == pytest.approx(sum(k for k, _ in own))
        assert plan.predicted_kl <= plan.kl_bound == row["kl_bound"] == kl
        assert plan.predicted_kl_error == pytest.approx(1.96 * sum(e for _, e in own))
        assert (plan.budget, plan.tau) == (None, kl / 2)
        assert plan.name.startswith(f"tt-{strategy}-kl{kl:g}")
        tau = math.sqrt(plan.predicted_loss_mse / 8) or 1e-6
        both, _ = choose(strategy, "tt", GROUPS, gains, tau=tau, kl=kl, **options)
        assert both.predicted_kl <= kl
        assert both.predicted_loss_mse <= both.budget == tau**2 * 4.0
        assert both.predicted_gain <= plan.predicted_gain


def test_bounds_that_bind_together() -> None:
    """Three ops, each cheap under another bound: the plan is the best, by hand, of those that keep both."""
    gains = table(
        "gains",
        [
            {"objective": "tt", "group": g, "configuration": [f], "gain": gain} | cost
            for g, costs in enumerate([(0.9, 0.1), (0.1, 0.9), (0.4, 0.4)])
            for f, gain, cost in (
                ("fp32", 0.0, {"loss_mse": 0.0, "kl": 0.0}),
                ("bf16", 1.0 + g / 10, dict(zip(("loss_mse", "kl"), costs, strict=True))),
            )
        ],
    )
    for budgets, best in (
        ({"loss_mse": 1.0, "kl": 1.0}, 2.1),  # the first two ops, of loss and KL 1.0 each
        ({"loss_mse": 2.0, "kl": 0.6}, 2.2),  # the first and the last
        ({"loss_mse": 0.6, "kl": 2.0}, 2.3),  # the second and the last
        ({"loss_mse": 0.5, "kl": 0.5}, 1.2),  # the last alone
    ):
        rows, solution = solve_table(gains, budgets)
        assert (rows["gain"].sum(), solution.status) == (pytest.approx(best), "optimal")
        assert all(rows[c].sum() <= limit for c, limit in budgets.items())


def test_kl_that_was_not_measured_is_told() -> None:
    """A bound on KL needs a KL in every row, and a plan needs a bound."""
    options = {"mean_square_loss": 4.0, "base": "fp32"}
    with pytest.raises(MpqError, match="has no kl, or not for every configuration"):
        choose("prefix", "tt", GROUPS, tables("tt"), kl=0.1, **options)
    with pytest.raises(MpqError, match="give τ, or a bound on KL"):
        choose("prefix", "tt", GROUPS, tables("tt"), **options)
    with pytest.raises(MpqError, match="KL must be above zero, got -1"):
        choose("prefix", "tt", GROUPS, tables("tt"), kl=-1.0, **options)
    plan, row = choose("prefix", "tt", GROUPS, tables("tt"), tau=0.1, **options)
    assert plan.predicted_kl is row["predicted_kl"] is None


def test_what_overflows_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """An op whose values overflow a format is never put in it, and that is said; others are."""
    op, f = GROUPS["op"][0], FORMATS[0]
    alone = (pl.col("op") == op) & (pl.col("format") == f)
    rows = with_kl().with_columns(
        pl.when(alone).then(math.inf).otherwise(c).alias(c) for c in ("loss_mse", "kl")
    )
    gains = gains_tt(GROUPS, rows, FORMATS, "fp32", "ulp")
    assert f"{op} … in {f}: values overflow" in caplog.text
    everything = {"tau": 1e3, "kl": 1e6, "mean_square_loss": 4.0, "base": "fp32"}
    plan, _ = choose("ip_tt", "tt", GROUPS, gains, **everything)
    assert plan.formats[op] != f
    assert len(plan.lowered) >= GROUPS.height - 1


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_bad_tau_is_told(tau: float) -> None:
    """τ must be above zero."""
    with pytest.raises(MpqError, match="above zero"):
        choose("prefix", "tt", GROUPS, tables("tt"), tau=tau, mean_square_loss=4.0, base="fp32")


def test_times_beside_another_base_are_told() -> None:
    """What is all in base gains nothing by definition: gains counted from another base are refused."""
    with pytest.raises(MpqError, match="not counted from bf16"):
        gains_et(GROUPS, timing(), sensitivity(), "bf16", "ulp")


def test_an_operand_that_is_missing_or_twice_is_told() -> None:
    """Half of an op's operands cost less than the op, and a table put together twice costs twice as much: neither makes gains."""
    table, op = sensitivity(), GROUPS["op"][0]
    of = (pl.col("op") == op) & (pl.col("operand") == "weight") & (pl.col("format") == "fp8_e4m3")
    with pytest.raises(MpqError, match=rf"no row for {op} in fp8_e4m3"):
        gains_tt(GROUPS, table.filter(~of), FORMATS, "fp32", "ulp")
    with pytest.raises(MpqError, match="twice in one format"):
        gains_tt(GROUPS, pl.concat([table, table]), FORMATS, "fp32", "ulp")


def test_missing_rows_are_told() -> None:
    """A format that was not calibrated and a signature that was not timed are named."""
    with pytest.raises(MpqError, match=r"no row for .* in int8"):
        gains_tt(GROUPS, sensitivity(), ["int8"], "fp32", "ulp")
    with pytest.raises(MpqError, match="timing table has no row for"):
        gains_et(GROUPS, timing().head(1), sensitivity(), "fp32", "ulp")
    broken = sensitivity().with_columns(loss_mse=pl.lit(math.nan))
    with pytest.raises(MpqError, match="loss MSE nan"):
        gains_tt(GROUPS, broken, FORMATS, "fp32", "ulp")
