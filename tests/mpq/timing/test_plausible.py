"""Predictions that no device could keep are told."""

from __future__ import annotations

import math

import polars as pl
import pytest
from synthetic import make_run

from mpq.cli.console import emit_results
from mpq.report.results import results_table
from mpq.timing.plausible import TPOT, implausible


@pytest.mark.parametrize("predicted", [-1e-3, 0.0, 4e-3, math.nan, math.inf])
def test_what_cannot_be_is_one_sentence(predicted: float) -> None:
    """Negative, nothing, faster than FP8 throughout (half of BF16's time), or not a number."""
    told = implausible(predicted, 10e-3, ["bf16", "fp8_e4m3"], "bf16")
    assert told is not None
    assert "cannot be" in told


def test_what_may_be_is_not_spoken_of() -> None:
    """A plan that gains, one that loses, one of base alone, and what was never predicted."""
    for predicted, formats in (
        (6e-3, ["fp8_e4m3"]),
        (30e-3, ["fp8_e4m3"]),
        (10e-3, []),
        (None, []),
    ):
        assert implausible(predicted, 10e-3, formats, "bf16") is None
    assert implausible(6e-3, 10e-3, [], "bf16"), "all in base gains nothing"
    assert implausible(5e-3, None, ["fp8_e4m3"], "bf16") is None


def test_further_tokens_read_their_weights() -> None:
    """Weights in 4 bits may make a token four times as fast as in 16, though they are multiplied in BF16; no more."""
    assert implausible(3e-3, 10e-3, ["w4a16"], "bf16", TPOT) is None
    assert implausible(3e-3, 10e-3, ["w4a16"], "bf16"), "a prompt's products are BF16's"
    told = implausible(2e-3, 10e-3, ["w4a16"], "bf16", TPOT)
    assert told is not None
    assert "The predicted time per further token of 2 ms cannot be" in told
    assert implausible(-1e-3, 10e-3, ["int8"], "bf16", TPOT)


def test_the_terminal_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the table, on stderr, once for each plan that a note doubts; other notes are the report's."""
    run = make_run(layers=2, seeds=1)
    told = implausible(1e-3, 20e-3, ["int8"], "bf16")
    of = (pl.col("strategy") == "ip_et") & (pl.col("tau") == pl.col("tau").min())
    doubted = pl.when(of).then(pl.lit(told)).otherwise(pl.lit("Gurobi is not there."))
    for note, count in ((doubted, 1), (pl.lit("Gurobi is not there."), 0)):
        solutions = run["solutions"].with_columns(note.alias("note"))
        emit_results(results_table({**run, "solutions": solutions}), True, None, {})
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("et by ip_et: The predicted TTFT of 1 ms cannot be") == count
        assert "Gurobi" not in said
