"""What the report says in numbers and sentences of a synthetic run, each found another way."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

import polars as pl
import pytest
from synthetic import (
    BASE,
    BASE_TTFT,
    TAUS,
    make_run,
    with_intervals,
)

from mpq.errors import MpqError
from mpq.report.results import plan_results, results_table
from mpq.report.summary import summarize

RUN = with_intervals(make_run())


def test_results_are_means_over_seeds() -> None:
    """Predicted and measured values of one random row, computed again by hand from the rows of both draws."""
    row = results_table(RUN).row(
        by_predicate=(pl.col("objective") == "et")
        & (pl.col("strategy") == "random")
        & (pl.col("tau") == 0.002),
        named=True,
    )

    def of(name: str, **equal: object) -> list[dict[str, Any]]:
        wanted = {"objective": "et", "strategy": "random", "tau": 0.002, **equal}
        return [
            r for r in RUN[name].iter_rows(named=True) if all(r[k] == v for k, v in wanted.items())
        ]

    losses = [r["value"] for r in of("evaluation", metric="loss_mse")]
    assert row["seeds"] == len(losses) == 4
    assert row["measured_loss_mse"] == pytest.approx(statistics.mean(losses))
    assert row["measured_loss_mse_std"] == pytest.approx(statistics.stdev(losses))
    assert row["predicted_loss_mse"] == pytest.approx(
        statistics.mean(r["predicted_loss_mse"] for r in of("solutions"))
    )
    assert row["measured_ttft_s"] == pytest.approx(
        statistics.mean(r["value"] for r in of("evaluation", metric="ttft_s"))
    )
    assert row["base_ttft_s"] == pytest.approx(
        statistics.mean(r["base_value"] for r in of("evaluation", metric="ttft_s"))
    )
    assert plan_results(RUN).height == 3 * 4 * 5


def test_summary_agrees_with_the_numbers() -> None:
    """Winners, the fastest plan, the median errors and the plans over their bound, each found another way."""
    summary = summarize(RUN)
    plans: dict[tuple[object, ...], dict[str, Any]] = {}
    for s in RUN["solutions"].iter_rows(named=True):
        plans[s["strategy"], s["objective"], s["tau"], s["seed"]] = {**s, "mse": [], "ttft_s": None}
    for e in RUN["evaluation"].iter_rows(named=True):
        plan = plans[e["strategy"], e["objective"], e["tau"], e["plan_seed"]]
        if e["metric"] == "loss_mse":
            plan["mse"].append(e["value"])
        elif e["metric"] == "ttft_s":
            # times are compared at the speed that the machine had while configurations were timed
            speed = BASE_TTFT / e["base_value"]
            plan["ttft_s"], plan["base"], plan["carried"] = (
                e["value"],
                e["base_value"],
                e["value"] * speed,
            )
    mse = {k: statistics.mean(p["mse"]) for k, p in plans.items()}
    assert summary.loss_error == pytest.approx(
        statistics.median(abs(p["predicted_loss_mse"] / mse[k] - 1) for k, p in plans.items())
    )
    timed = [p for p in plans.values() if p["ttft_s"]]
    assert summary.ttft_error == pytest.approx(
        statistics.median(abs(p["predicted_ttft_s"] / p["carried"] - 1) for p in timed)
    )
    assert len(summary.over_bound) == sum(mse[k] > p["budget"] for k, p in plans.items())
    assert summary.best is not None
    within = [p for k, p in plans.items() if p["ttft_s"] and mse[k] <= p["budget"]]
    fastest = min(within, key=lambda p: p["carried"])
    assert summary.best.outline.ttft_s == fastest["ttft_s"]
    assert len(summary.standings) == 3 * len(TAUS)
    standing = {s.tau: s for s in summary.standings if s.objective == "et"}
    for tau in TAUS:
        ip = plans["ip_et", "et", tau, 0]
        assert standing[tau].gain.value == pytest.approx(BASE_TTFT - ip["carried"])
        assert standing[tau].share == pytest.approx(1 - ip["ttft_s"] / ip["base"])
    assert not summary.out_of_range


def test_warns_where_the_prediction_fails() -> None:
    """A plan measured at three times its prediction, and one at a third, are named in a warning."""
    of_plan = (pl.col("strategy") == "ip_tt") & (pl.col("metric") == "loss_mse")
    factor = (
        pl.when(of_plan & (pl.col("tau") == 0.002))
        .then(3.0)
        .when(of_plan & (pl.col("tau") == 0.004))
        .then(1 / 3)
        .otherwise(1.0)
    )
    run = {**RUN, "evaluation": RUN["evaluation"].with_columns(pl.col("value") * factor)}
    summary = summarize(run)
    assert {(r["strategy"], r["tau"]) for r in summary.out_of_range} == {
        ("ip_tt", 0.002),
        ("ip_tt", 0.004),
    }
    assert any("ip_tt at τ = 0.002" in w and "ip_tt at τ = 0.004" in w for w in summary.warnings)
    assert any("above the bound" in w and "ip_tt at τ = 0.002" in w for w in summary.warnings)


def test_bounds_on_what_was_not_measured_are_not_called_kept() -> None:
    """Plans under a bound on KL whose KL nobody measured: no sentence says that all stay inside."""
    kl = RUN["solutions"].with_columns(budget=pl.lit(None, pl.Float64), kl_bound=pl.lit(0.01))
    small = pl.when(pl.col("metric") == "loss_mse").then(1e-3 * pl.col("value")).otherwise("value")
    run, kept = (
        {**RUN, "evaluation": RUN["evaluation"].with_columns(value=small)},
        "No plan exceeds",
    )
    assert any(kept in s for s in summarize(run).sentences)
    assert not any(kept in s for s in summarize({**run, "solutions": kl}).sentences)


def gaining(**gains: float) -> dict[str, pl.DataFrame]:
    """The run with the same measured time gain (s, ± 1 ms) of each strategy at every τ."""
    run = make_run(layers=2)
    value = pl.col("base_value") - pl.col("strategy").replace_strict(gains, default=0.0)
    timed = pl.col("metric") == "ttft_s"
    even = run["evaluation"].with_columns(
        base_value=pl.when(timed).then(pl.lit(BASE_TTFT)).otherwise("base_value")
    )
    measured = even.with_columns(value=pl.when(timed).then(value).otherwise("value"))
    return with_intervals({**run, "evaluation": measured}, half=1e-3)


def test_ahead_is_what_the_intervals_say() -> None:
    """Gains 1.9 ms apart, known to ± 1 ms, are not told apart; 2.1 ms apart they are, whoever is ahead."""
    run = gaining(ip_et=5e-3, random=3.1e-3, prefix=2.9e-3)
    for s in (s for s in summarize(run).standings if s.objective == "et"):
        assert (s.ahead, s.level, s.behind) == (("prefix",), ("random",), ())
    noisy = gaining(ip_et=5e-3, random=6.9e-3, prefix=7.1e-3)
    for s in (s for s in summarize(noisy).standings if s.objective == "et"):
        assert (s.ahead, s.level, s.behind) == ((), ("random",), ("prefix",))
    told = next(s for s in summarize(noisy).sentences if s.startswith("Time saved, measured"))
    assert told == (
        "Time saved, measured: ip_et is not told apart from random at every τ and behind prefix at "
        "every τ."
    )


def test_a_time_without_an_interval_ranks_nobody() -> None:
    """A run whose gains were stored without intervals says of nobody that it is ahead."""
    standings = summarize(make_run(layers=2)).standings
    assert all(not s.ahead and not s.behind for s in standings if s.objective == "et")
    assert all(s.ahead == ("random", "prefix") for s in standings if s.objective != "et")


def test_a_plan_that_gains_nothing_is_told() -> None:
    """Where every plan is slower than base, base is what to run."""
    summary = summarize(gaining(ip_et=-2e-3, random=-2e-3, prefix=-2e-3))
    assert "gaining nothing at every τ" in summary.sentences[1]
    assert summary.sentences[0].startswith("Stay with base")


def test_a_table_without_its_columns_is_refused() -> None:
    """A table from something else is named, with what it lacks."""
    with pytest.raises(MpqError, match="solutions table lacks"):
        results_table({"solutions": pl.DataFrame({"strategy": ["ip_et"]})})


def test_results_need_no_pictures() -> None:
    """The joined tables, and the plan to run, load neither matplotlib nor Jinja."""
    code = (
        "import sys; from mpq.report.results import results_table; results_table({}); "
        "from mpq.report.best import best_plan, in_words; in_words(best_plan({})); "
        "print([m for m in ('torch', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_weights_by_hand() -> None:
    """Bytes of the linears: those in FP8 or INT8 take half of what BF16 does and a scale a channel, products take none."""
    linears = RUN["groups"].filter(pl.col("kind") == "linear")
    small = RUN["plans"].filter(
        pl.col("op").is_in(linears["op"].implode()) & (pl.col("format") != BASE)
    )
    for row in plan_results(RUN).sample(5, seed=1).iter_rows(named=True):
        lowered = small.filter(
            pl.col("objective") == row["objective"],
            pl.col("strategy") == row["strategy"],
            pl.col("tau") == row["tau"],
            pl.col("seed") == row["plan_seed"],
        )
        assert row["base_weight_bytes"] == 2 * 512 * 512 * linears.height
        codes, scales = 512 * 512 * (2 * linears.height - lowered.height), 4 * 512 * lowered.height
        assert row["weight_bytes"] == codes + scales
