"""Gains of configurations predicted from those of others: exactness, stated errors, what interacts, and what is uncertain."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from mpq.timing.gain_model import Configuration, GainModel

FORMATS = ("fp32", "bf16", "int8")
CHOICES = ((FORMATS,) * 3) + (
    FORMATS[:2],
) * 2  # three projections and attention's products: 108 configurations
EVERY: list[Configuration] = list(itertools.product(*CHOICES))


def attention(configuration: Configuration) -> float:
    """Seconds gained: each projection's own, and a toll for leaving the fused attention, paid once for either product and made
    good by both; the projections of attention's format lose no cast."""
    own = {"fp32": 0.0, "bf16": 3e-3, "int8": 5e-3}
    *projections, qk, av = configuration
    left = {0: 0.0, 1: -9e-3, 2: -1e-3}[(qk != "fp32") + (av != "fp32")]
    return (
        sum(own[f] for f in projections) + left + 5e-4 * sum(f == qk == "bf16" for f in projections)
    )


def some(n: int, seed: int = 0) -> list[Configuration]:
    """`n` configurations at random, all-base not among them."""
    rng = np.random.default_rng(seed)
    return [EVERY[i] for i in rng.permutation(np.arange(1, len(EVERY)))[:n]]


def fitted(
    of: list[Configuration],
    noise_s: float = 0.0,
    truth: Callable[[Configuration], float] = attention,
) -> GainModel:
    rng = np.random.default_rng(1)
    return GainModel.fit(
        CHOICES, of, [truth(c) + rng.normal(0, noise_s) for c in of], [noise_s] * len(of)
    )


def test_what_was_never_measured_is_predicted_with_its_error() -> None:
    """40 of 107 tell the others to a few percent of their spread, non-additive as they are, and errors keep what they state."""
    measured = some(40)
    others = [c for c in EVERY if c not in measured]
    for noise_s in (0.0, 2e-4):
        mean, error = fitted(measured, noise_s).predict(others)
        truth = np.array([attention(c) for c in others])
        off = mean - truth
        assert np.sqrt(np.mean(off**2)) < 0.08 * truth.std()
        assert np.mean(np.abs(off) <= 2 * error + 1e-9) > 0.8


def test_certain_gains_are_met_and_base_gains_nothing() -> None:
    """Without noise the model goes through what was measured; all-base is 0 without being measured."""
    measured = some(30)
    model = fitted(measured)
    mean, error = model.predict([*measured, EVERY[0]])
    np.testing.assert_allclose(mean, [*map(attention, measured), 0.0], atol=2e-5)
    assert error.max() < 1e-4


def test_the_ops_that_interact_are_found() -> None:
    """Attention's two products change what each other gains, the projections hardly."""
    a = fitted(some(60), 1e-4).a
    assert min(a[3:]) > 3 * max(a[:3])


def test_a_repeated_noisy_measurement_is_averaged() -> None:
    """Measured twice, a configuration counts twice: its error is less, its gain between the two."""
    measured = some(40)
    once = fitted(measured, 1e-3)
    gains = [attention(c) for c in measured]
    twice = GainModel.fit(CHOICES, [*measured, measured[0]], [*gains, gains[0] + 2e-3], [1e-3] * 41)
    assert twice.predict(measured[:1])[1] < once.predict(measured[:1])[1]
    assert gains[0] < twice.predict(measured[:1])[0] + 1e-3 < gains[0] + 3e-3


def test_left_out_errors_are_those_of_fits_without() -> None:
    """The shortcut's errors, where σ and a change little by one measurement of many."""
    measured = some(60)
    model = fitted(measured, 2e-4)
    own = model.left_out()
    for i in (0, 7, 23):
        without = [c for j, c in enumerate(measured) if j != i]
        rng = np.random.default_rng(1)
        noisy = [attention(c) + rng.normal(0, 2e-4) for c in measured]
        mean, _ = GainModel.fit(CHOICES, without, noisy[:i] + noisy[i + 1 :], [2e-4] * 59).predict(
            [measured[i]]
        )
        assert own[i] == pytest.approx(noisy[i] - mean[0], abs=1e-4)


def test_nothing_gained_is_predicted_as_nothing() -> None:
    """Gains of zero everywhere: zero predicted, without a division by them."""
    mean, error = fitted(some(20), 0.0, lambda c: 0.0).predict(EVERY)
    assert (mean == 0).all()
    assert np.isfinite(error).all()


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="no gains"):
        GainModel.fit(CHOICES, [], [], [])
    with pytest.raises(ValueError, match="not in tuple"):
        GainModel.fit(CHOICES, [("fp8", *EVERY[0][1:])], [0.0], [0.0])
