"""Predictions that no device could keep are told."""

from __future__ import annotations

import math

import pytest

from mpq.timing.plausible import implausible


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
