"""Which plan a run recommends: by what was measured, within its bound, and surely better where it is
not the program's own."""

from __future__ import annotations

import polars as pl
import pytest
from synthetic import BASE_TTFT, TAUS, make_run, with_intervals, with_uniform

from mpq.report.best import best_plan, in_words, uniform_outlines
from mpq.report.figures import frontier
from mpq.report.findings import find
from mpq.report.page import write_report
from mpq.report.results import plus_minus, results_table
from mpq.report.summary import summarize

Tables = dict[str, pl.DataFrame]
SQUARE = 6.25


def measured(gains: dict[str, float], losses: dict[str, float], half: float = 2e-4) -> Tables:
    """The run where each strategy of et gains so many seconds at every τ, ± `half`, and has so many
    times its bound as measured loss."""
    run = with_uniform(make_run(layers=2, seeds=1))
    strategy, metric = pl.col("strategy"), pl.col("metric")
    gain = strategy.replace_strict(gains, default=0.0, return_dtype=pl.Float64)
    loss = strategy.replace_strict(losses, default=1.0, return_dtype=pl.Float64)
    evaluation = run["evaluation"].with_columns(
        base_value=pl.when(metric == "ttft_s").then(BASE_TTFT).otherwise("base_value"),
        value=pl.when(metric == "ttft_s")
        .then(BASE_TTFT - gain * (1 + pl.col("tau")))  # a little more at a larger τ
        .when(metric == "loss_mse")
        .then(loss * pl.col("tau") ** 2 * SQUARE)
        .otherwise("value"),
    )
    return with_intervals({**run, "evaluation": evaluation}, half)


def test_the_fastest_within_its_bound() -> None:
    """Of the program's plans the one that gains most, at the largest τ, as long as it keeps its bound."""
    best = best_plan(measured({"ip_et": 5e-3, "random": 3e-3}, {"ip_et": 0.9, "random": 0.9}))
    assert best is not None
    assert best.outline.plan == f"et-ip_et-tau{TAUS[-1]:g}"
    assert best.outline.within is True
    assert best.reservation == ""
    said = in_words(best)
    assert said.startswith(
        "Run et-ip_et-tau0.008: 14.96 ms to the first token, 5.0 ± 0.2 ms less than base's 20; "
    )
    assert "MB of weights instead of" in said
    assert "perplexity +" in said


def test_a_broken_bound_is_no_choice() -> None:
    """The program's plans exceed their bounds when measured: a slower one that keeps its bound is taken."""
    best = best_plan(measured({"ip_et": 5e-3, "prefix": 2e-3}, {"ip_et": 1.2, "prefix": 0.9}))
    assert best is not None
    assert best.outline.strategy == "prefix"


def bounded_by_kl(tables: Tables, predicted: float, shares: dict[str, float]) -> Tables:
    """The run with its bounds on the loss taken for bounds κ = τ on KL; measured `shares` of κ."""
    solutions = tables["solutions"].with_columns(
        budget=pl.lit(None, pl.Float64), kl_bound="tau", predicted_kl=predicted * pl.col("tau")
    )
    share = pl.col("strategy").replace_strict(shares, default=2.0, return_dtype=pl.Float64)
    rows = tables["evaluation"].filter(pl.col("metric") == "loss_mse")
    kl = rows.with_columns(metric=pl.lit("kl"), value=share * pl.col("tau"), base_value=pl.lit(0.0))
    return {**tables, "solutions": solutions, "evaluation": pl.concat([tables["evaluation"], kl])}


def test_a_plan_is_held_to_its_bound_on_kl() -> None:
    """Without a bound on the loss MSE it is the KL that counts, as measured, told as a perplexity as well."""
    tables = measured({"ip_et": 5e-3, "prefix": 2e-3}, {})
    inside = bounded_by_kl(tables, 0.9, {"ip_et": 0.95})
    best = best_plan(inside)
    assert best is not None
    assert (best.outline.plan, best.outline.within) == (f"et-ip_et-kl{TAUS[-1]:g}", True)
    assert best.outline.kl == 0.95 * TAUS[-1]
    assert "KL 0.0076 nats a token, as much as perplexity +0.76 %" in in_words(best)
    assert any("KL divergence above its bound" in w for w in summarize(inside).warnings)
    over = best_plan(bounded_by_kl(tables, 0.9, {"ip_et": 1.1, "prefix": 0.8}))
    assert over is not None
    assert over.outline.strategy == "prefix"
    page = write_report(inside, "run", {})
    assert "KL divergence from base, predicted and measured" in page
    assert "nats a token of KL divergence from base" in page
    (axes,) = frontier(results_table(inside)).axes
    assert axes.get_ylabel() == "KL from base, measured (nats a token)"
    (line,) = (line for line in axes.lines if line.get_label() == "ip_et")
    assert list(line.get_ydata()) == pytest.approx([0.95 * tau for tau in TAUS])  # type: ignore[arg-type]


def test_of_plans_bounded_by_kl_its_prediction_counts() -> None:
    """The error of the predicted KL is told; a loss MSE far from its prediction breaks no bound, and is no warning."""
    far = measured({"ip_et": 5e-3, "prefix": 2e-3}, {"ip_et": 30.0, "prefix": 30.0})
    of_loss = [*summarize(far).warnings, *find(far).warnings]
    assert any("outside 0.5 to 2" in w for w in of_loss)
    told = bounded_by_kl(far, 0.9, {"ip_et": 1.0, "prefix": 1.0})
    solutions = told["solutions"].filter(pl.col("strategy").is_in(["ip_et", "prefix"]))
    told = {**told, "solutions": solutions}
    assert summarize(told).kl_error == pytest.approx(0.1)
    assert not any("loss MSE" in w for w in [*summarize(told).warnings, *find(told).warnings])
    (kl,) = (a for a in find(told).additivity if a.quantity == "KL")
    assert kl.median == pytest.approx(1 / 0.9)
    assert any("Measured KL divergence is 1.11 times" in s for s in find(told).sentences)


def test_no_plan_in_its_bound_is_said() -> None:
    """Where all exceed their bounds, the nearest is given, and how far it is off."""
    gains = {"ip_et": 5e-3, "random": 3e-3, "prefix": 2e-3}
    best = best_plan(measured(gains, {"ip_et": 1.5, "random": 1.2, "prefix": 1.4}))
    assert best is not None
    assert best.outline.strategy == "random"
    assert best.outline.within is False
    assert "No plan's measured loss stays within its bound" in in_words(best)
    assert "at 1.20 times its bound" in in_words(best)


@pytest.mark.parametrize(("half", "chosen"), [(1e-3, "ip_et"), (2e-4, "random")])
def test_another_is_taken_where_it_is_surely_faster(half: float, chosen: str) -> None:
    """A baseline that seems 1 ms faster: taken where that is known to ± 0.2 ms, left where to ± 1."""
    losses = {"ip_et": 0.9, "random": 0.9}
    best = best_plan(measured({"ip_et": 5e-3, "random": 6e-3}, losses, half))
    assert best is not None
    assert best.outline.strategy == chosen
    assert best.outline.plan.endswith("-seed0") == (chosen == "random")


def test_a_uniform_plan_is_held_to_the_largest_bound() -> None:
    """It keeps its own prediction, which bounds nothing; within the largest bound of the run and
    surely faster it is the answer, and is called by its format alone."""
    losses = {"ip_et": 0.9, "uniform_int8": 1.0, "uniform_int8_but_head": 1e9}
    tables = measured({"ip_et": 5e-3, "uniform_int8": 9e-3}, losses)
    best = best_plan(tables)
    assert best is not None
    assert best.outline.strategy == "ip_et"
    inside = TAUS[-1] ** 2 * SQUARE * 0.9
    own = (pl.col("strategy") == "uniform_int8") & (pl.col("metric") == "loss_mse")
    value = pl.when(own).then(inside).otherwise("value")
    best = best_plan({**tables, "evaluation": tables["evaluation"].with_columns(value=value)})
    assert best is not None
    assert best.outline.plan == "et-uniform_int8"


def test_a_gain_that_may_be_nothing_is_said() -> None:
    """0.5 ± 1 ms is a gain, and may be none."""
    best = best_plan(measured({"ip_et": 5e-4}, {"ip_et": 0.9}, half=1e-3))
    assert "not told apart from nothing" in in_words(best)


def test_without_times_memory_is_what_counts() -> None:
    """A run for memory alone: the largest saving within its bound, in bytes."""
    run = {
        name: frame.filter(pl.col("objective") == "m") if "objective" in frame.columns else frame
        for name, frame in measured({}, {"ip_m": 0.9}).items()
    }
    best = best_plan(run)
    assert best is not None
    assert best.outline.plan == f"m-ip_m-tau{TAUS[-1]:g}"
    assert "to the first token" not in in_words(best)
    assert "MB of weights instead of" in in_words(best)


def test_what_was_not_evaluated_is_said() -> None:
    """Without an evaluation the choice rests on the prediction, and says so."""
    run = make_run(layers=2)
    assert "No plan was evaluated" in in_words(best_plan({**run, "evaluation": pl.DataFrame()}))
    assert in_words(best_plan({})).startswith("Stay with base")


def test_the_plan_of_a_target_is_what_was_asked_for() -> None:
    """Where a spec has a target its plan is proposed, though another within its bound gains more."""
    run = measured({"ip_et": 3e-3, "prefix": 1e-3}, {})
    before = best_plan(run)
    assert before is not None
    assert before.outline.strategy == "ip_et"
    asked = {
        name: of.with_columns(strategy=pl.col("strategy").replace("prefix", "ip_loss"))
        if "strategy" in of.columns
        else of
        for name, of in run.items()
    }
    best = best_plan(asked)
    assert best is not None
    assert best.outline.strategy == "ip_loss"
    assert not best.reservation


def test_every_uniform_plan_is_outlined_once() -> None:
    """Those of the objective asked for first; what another objective has as well is not repeated."""
    outlines = uniform_outlines(with_uniform(make_run(layers=2)), "et")
    assert [o.plan for o in outlines] == ["et-uniform_int8", "et-uniform_int8_but_head"]
    outlines = uniform_outlines(with_uniform(make_run(layers=2)), "m")
    assert [o.plan for o in outlines] == ["m-uniform_int8", "et-uniform_int8_but_head"]


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (8.127, 0.93, "8.1 ± 0.9"),
        (8.127, 0.14, "8.13 ± 0.14"),
        (8.127, 0.2, "8.1 ± 0.2"),
        (-3.2, 12.0, "−3 ± 12"),
        (8.127, None, "8.127"),
        (8.127, 0.0, "8.127"),
    ],
)
def test_as_many_digits_as_the_error_deserves(value: float, half: float | None, text: str) -> None:
    """One digit of the error, two where it begins with a 1; the value to the same place."""
    assert plus_minus(value, half) == text
