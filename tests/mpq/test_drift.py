"""A machine that changes speed between timing and measuring is told from a time model that errs."""

from __future__ import annotations

import polars as pl
import pytest
from synthetic import BASE_TTFT, make_run

from mpq.drift import carried, drift_of
from mpq.findings import find
from mpq.report import plan_results, results_table

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
    assert drift_of(results_table({**RUN, "evaluation": RUN["evaluation"].filter(pl.col("metric") != "ttft_s")})) is None


@pytest.mark.parametrize(("by", "word"), [(1.8, "80% slower"), (0.5, "50% faster")])
def test_a_change_of_speed_is_told_and_breaks_no_sum(by: float, word: str) -> None:
    """The one warning names it; ratios, gains and R² are those of the steady run."""
    found, steady = find(slowed(by)), find(RUN)
    (warning,) = found.warnings
    assert word in warning
    assert f"took {1e3 * BASE_TTFT:g} ms then" in warning
    assert found.gain_r2 == pytest.approx(steady.gain_r2)
    for got, want in zip(found.additivity, steady.additivity, strict=True):
        assert got.error == pytest.approx(want.error)


def test_a_time_model_that_errs_is_still_told() -> None:
    """On a machine of half the speed, plans that take a fifth longer than their base explains: both are warned of."""
    told = find(slowed(2.0, 1.2)).warnings
    assert [words in " ".join(told) for words in ("slower beside the plans", "do not add up over groups")] == [True, True]


def test_carried_by_hand() -> None:
    """Base 10 ms at timing, 20 beside the plan, which took 15: at the first speed it takes 7.5 and gains 2.5. Unknown speeds are 1."""
    row = {"solved_base_ttft_s": 0.010, "base_ttft_s": 0.020, "measured_ttft_s": 0.015}
    got = carried(pl.DataFrame([row, row | {"solved_base_ttft_s": None}]))
    assert got["carried_ttft_s"].to_list() == pytest.approx([0.0075, 0.015])
    assert got["carried_gain_s"].to_list() == pytest.approx([0.0025, 0.005])
    assert {"solved_base_ttft_s", "base_ttft_s"} <= set(plan_results(RUN).columns)
