"""A machine that changes speed between timing and measuring is told from a time model that errs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial

import polars as pl
import pytest
from matplotlib.figure import Figure
from synthetic import BASE_TTFT, TAUS, make_run

from mpq.cli.console import emit_results
from mpq.report.figures import frontier, predicted_against_measured
from mpq.report.findings import find
from mpq.report.results import plan_results, results_table
from mpq.report.summary import summarize
from mpq.timing.drift import carried, drift_of

RUN = make_run()


def slowed(by: float, plans: float = 1.0) -> dict[str, pl.DataFrame]:
    """The run with every TTFT measured `by` times as long, and the plans' own `plans` times beyond that."""
    timed = pl.col("metric") == "ttft_s"
    value = pl.when(timed).then(pl.col("value") * by * plans).otherwise("value")
    base = pl.when(timed).then(pl.col("base_value") * by).otherwise("base_value")
    return {**RUN, "evaluation": RUN["evaluation"].with_columns(value=value, base_value=base)}


def test_a_steady_machine_is_not_spoken_of() -> None:
    """Nothing is said of base times that differ by noise, nor where nothing was timed."""
    assert drift_of(results_table(RUN)) is None
    assert (
        drift_of(
            results_table(
                {**RUN, "evaluation": RUN["evaluation"].filter(pl.col("metric") != "ttft_s")}
            )
        )
        is None
    )


@pytest.mark.parametrize("by", [1.8, 0.5])
def test_a_change_of_speed_is_told_and_breaks_no_sum(by: float) -> None:
    """The one warning names both speeds; ratios, gains, R² and who wins are those of the steady run."""
    found, steady = find(slowed(by)), find(RUN)
    (warning,) = found.warnings
    assert f"base took {1e3 * BASE_TTFT:g} ms while configurations were timed" in warning
    now, before = summarize(slowed(by)), summarize(RUN)
    assert [(s.ahead, s.level, round(s.gain.value, 12)) for s in now.standings] == [
        (s.ahead, s.level, round(s.gain.value, 12)) for s in before.standings
    ]
    assert (now.ttft_error, now.gain_error) == pytest.approx((before.ttft_error, before.gain_error))
    assert found.gain_r2 == pytest.approx(steady.gain_r2)
    for got, want in zip(found.additivity, steady.additivity, strict=True):
        assert got.error == pytest.approx(want.error)


def test_a_change_between_plans_is_told_though_the_median_is_steady() -> None:
    """Two of five plans at half the speed: the median says nothing, the range does."""
    frame = RUN["evaluation"]
    slow = (pl.col("metric") == "ttft_s") & pl.col("tau").is_in(TAUS[:2])
    run = {
        **RUN,
        "evaluation": frame.with_columns(
            pl.when(slow).then(2 * pl.col(c)).otherwise(c).alias(c) for c in ("value", "base_value")
        ),
    }
    (warning,) = find(run).warnings
    assert "The machine changed speed" in warning
    points = [
        results.filter(pl.col("objective") == "et")["carried_ttft_s"].to_list()
        for results in map(results_table, (run, RUN))
    ]
    assert points[0] == pytest.approx(points[1])


@pytest.mark.parametrize("broken", [math.nan, 0.0, None])
def test_a_base_that_was_not_measured_says_nothing(broken: float | None) -> None:
    """NaN, zero or missing: no sentence with nonsense in it."""
    timed = pl.col("metric") == "ttft_s"
    frame = RUN["evaluation"].with_columns(
        base_value=pl.when(timed).then(pl.lit(broken, pl.Float64)).otherwise("base_value")
    )
    assert drift_of(results_table({**RUN, "evaluation": frame})) is None


def test_a_time_model_that_errs_is_still_told() -> None:
    """On a machine of half the speed, plans that take a fifth longer than their base explains: both are warned of."""
    told = find(slowed(2.0, 1.2)).warnings
    assert [
        words in " ".join(told)
        for words in ("The machine changed speed", "do not add up over groups")
    ] == [True, True]


def drawn(figure: Figure) -> list[tuple[list[float], list[float]]]:
    """The points and lines of a figure's one pair of axes."""
    return [
        (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
        for line in figure.axes[0].get_lines()
    ]


@pytest.mark.parametrize(
    "figure_of",
    [frontier, *(partial(predicted_against_measured, what=what) for what in ("ttft", "gain"))],
)
def test_figures_do_not_move_with_the_machine(figure_of: Callable[[pl.DataFrame], Figure]) -> None:
    """At half the speed beside the plans every point and the base's line lie where they did."""
    for (x, y), (x_steady, y_steady) in zip(
        *(drawn(figure_of(results_table(run))) for run in (slowed(2.0), RUN)), strict=True
    ):
        assert x == pytest.approx(x_steady)
        assert y == pytest.approx(y_steady)


def test_the_terminal_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the table, on stderr: what goes to a file or a pipe stays data."""
    for run, told in ((slowed(2.0), True), (RUN, False)):
        emit_results(results_table(run), True, None, {})
        out, err = capsys.readouterr()
        assert (
            len(json.loads(out)["results"] if out.startswith("{") else json.loads(out))
            == results_table(run).height
        )
        assert ("The machine changed speed" in " ".join(err.split())) == told


def test_carried_by_hand() -> None:
    """Base 10 ms at timing, 20 beside the plan, which took 15: at the first speed it takes 7.5 and gains 2.5. Unknown speeds are 1."""
    row = {"solved_base_ttft_s": 0.010, "base_ttft_s": 0.020, "measured_ttft_s": 0.015}
    got = carried(pl.DataFrame([row, row | {"solved_base_ttft_s": None}]))
    assert got["carried_ttft_s"].to_list() == pytest.approx([0.0075, 0.015])
    assert got["carried_gain_s"].to_list() == pytest.approx([0.0025, 0.005])
    assert {"solved_base_ttft_s", "base_ttft_s"} <= set(plan_results(RUN).columns)
