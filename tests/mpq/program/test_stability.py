"""program/stability.py: what other calibrations would say, against calibrations that are drawn from known samples."""

import itertools
from statistics import fmean

import numpy as np
import polars as pl
import pytest

from mpq.program.gains import solve_table
from mpq.program.stability import advised, stability

OPS, FORMATS, BASE = 24, ("bf16", "int8", "fp8_e4m3"), "bf16"


def sample_costs(samples: int, seed: int) -> np.ndarray:
    """Each sample's KL of each op in each format: ops differ, and so do samples, alike for all formats of an op."""
    of_ops = np.exp(np.random.default_rng(1).normal(0, 0.5, (OPS, 1)))
    hard = np.random.default_rng(seed).gamma(2.0, 0.5, (samples, OPS, 1))
    return 1e-4 * of_ops * hard * np.array([0.0, 1.0, 2.5])


def gains_of(costs: np.ndarray) -> pl.DataFrame:
    """The table that a calibration on these samples (samples, ops, formats) makes."""
    error = costs.std(0, ddof=1) / np.sqrt(len(costs))
    return pl.DataFrame(
        [
            {
                "group": op,
                "configuration": [f],
                "gain": float(op % 5 + 1) * gained,
                "kl": costs[:, op, i].mean(),
                "kl_stderr": error[op, i],
            }
            for op in range(OPS)
            for i, (f, gained) in enumerate(zip(FORMATS, (0.0, 1.0, 1.4), strict=True))
        ]
    )


def lowered(gains: pl.DataFrame, bound: float) -> set[tuple[int, str]]:
    rows, _ = solve_table(gains, {"kl": bound})
    return {(g, c[0]) for g, c in rows.select("group", "configuration").iter_rows() if c[0] != BASE}


@pytest.mark.parametrize("samples", [8, 64])
def test_it_says_what_other_samples_would_choose(samples: int) -> None:
    """From the standard errors of single calibrations, the overlap of two others' choices is, in the mean, that of
    choices on samples really drawn anew, at as many samples and at four times as many."""
    bound = 1.5e-3
    curves = [
        stability(gains_of(sample_costs(samples, s)), "kl", bound, samples, BASE, (1.0, 4.0))
        for s in range(6)
    ]
    for of in zip(*curves, strict=True):
        chosen = [lowered(gains_of(sample_costs(of[0].samples, s)), bound) for s in range(10, 20)]
        again = fmean(len(a & b) / len(a | b) for a, b in itertools.combinations(chosen, 2))
        assert fmean(at.alike for at in of) == pytest.approx(again, abs=0.08)
    first, fourth = curves[0]
    assert first.samples == samples
    assert fourth.known == pytest.approx(first.known / 2)


def test_the_cost_is_known_to_two_standard_errors() -> None:
    """`known` is half the 95 % interval of the chosen plan's cost, its ops' errors added, over the cost itself."""
    gains = gains_of(sample_costs(16, 3))
    rows, _ = solve_table(gains, {"kl": 1e-3})
    (own,) = stability(gains, "kl", 1e-3, 16, BASE, (1.0,), draws=2)
    assert own.known == pytest.approx(1.96 * rows["kl_stderr"].sum() / rows["kl"].sum())


def test_few_samples_are_told() -> None:
    """With large errors at first more samples are advised, the first number of the curve that is enough; with none the
    first of all is."""
    gains = gains_of(sample_costs(8, 0))
    curve = stability(gains, "kl", 1.5e-3, 8, BASE, (1.0, 1024.0))
    assert [at.enough for at in curve] == [False, True]
    assert advised(curve) == 8 * 1024
    sure = gains.with_columns(kl_stderr=pl.lit(0.0))
    (own,) = stability(sure, "kl", 1.5e-3, 8, BASE, (1.0,))
    assert (own.alike, own.known, own.enough) == (1.0, 0.0, True)


def test_without_errors_nothing_is_told() -> None:
    """One sample has no standard error, and no plan no cost: there is no curve."""
    gains = gains_of(sample_costs(8, 0))
    unknown = gains.with_columns(kl_stderr=pl.lit(None, pl.Float64))
    assert stability(unknown, "kl", 1e-3, 1, BASE) == []
    assert (
        stability(gains.filter(pl.col("configuration").list.first() == BASE), "kl", 1.0, 8, BASE)
        == []
    )
