"""Bounds on whole plans as rows of the program: effective bits, bytes of weights, shares of formats, a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from mpq.errors import MpqError
from mpq.program.constraints import Allowed
from mpq.program.memory import bytes_of_rows, effective_bits, weight_bytes, weights_of
from mpq.program.rows import Row, solve_within
from mpq.timing.design import members

if TYPE_CHECKING:
    from mpq.spec import BoundsSpec, ConstraintSpec, TargetSpec


def bound_rows(
    gains: pl.DataFrame, groups: pl.DataFrame, bounds: BoundsSpec | TargetSpec, base: str
) -> list[Row]:
    """A row for each bound that is set, over the rows of the gains table. Shares are of the ops decided."""
    of = members(groups, gains)
    group, configurations = gains["group"].to_list(), gains["configuration"].to_list()
    rows = []
    if bounds.effective_bits or bounds.weight_bytes:
        sums, rest = bytes_of_rows(
            groups, [(of[g], c) for g, c in zip(group, configurations, strict=True)], base
        )
        values = np.array(sums) + rest * (gains["group"] == group[0]).to_numpy()
        if bounds.effective_bits:
            per = max(1, weights_of(groups)) / 8
            rows.append(Row("effective_bits", values, bounds.effective_bits * per, "", per))
        if bounds.weight_bytes:
            rows.append(Row("weight_bytes", values, bounds.weight_bytes, "bytes"))
    shares = getattr(bounds, "min_share", {})  # a target has none
    for name, share in shares.items():
        decided = sum(map(len, of.values()))
        count = -np.array([float(c.count(name)) for c in configurations])
        # a share of 0.1 of 30 ops is 3 of them, whatever 0.1 is in binary
        rows.append(Row(f"share of {name}", count, -share * decided, per=-decided, slack=1e-9))
    return rows


def time_row(gains: pl.DataFrame, base_ttft_s: float, ttft_s: float) -> Row:
    """The predicted TTFT, base's less the gains (s), at most `ttft_s`; of whole answers what their first token gains counts."""
    values = -gains["ttft_gain" if "ttft_gain" in gains.columns else "gain"].to_numpy()
    first = (gains["group"] == gains["group"][0]).to_numpy()
    rounding = 1e-12 * base_ttft_s
    return Row("ttft", values + base_ttft_s * first, ttft_s, "ms", 1e-3, rounding)


def target_rows(
    gains: pl.DataFrame,
    groups: pl.DataFrame,
    target: TargetSpec,
    base: str,
    base_ttft_s: float | None,
) -> list[Row]:
    """The row of a target. Raises MpqError for a time without measured ones."""
    if target.ttft_ms is None:
        return bound_rows(gains, groups, target, base)
    if base_ttft_s is None:
        raise MpqError("A target of ttft_ms needs measured times: solve for the objective et.")
    return [time_row(gains, base_ttft_s, target.ttft_ms / 1e3)]


def check_possible(groups: pl.DataFrame, allowed: Allowed, constraints: ConstraintSpec) -> None:
    """Raise NoPlan for bounds that no plan keeps, whatever it costs in loss: told before anything is measured."""
    parts = [
        (i, together, f)
        for i, together in enumerate(allowed.decisions)
        for f in allowed.formats[together[0]]
    ]
    rows = {
        "group": [i for i, _, _ in parts],
        "ops": [list(together) for _, together, _ in parts],
        "configuration": [[f] * len(together) for _, together, f in parts],
    }
    bounds = bound_rows(pl.DataFrame(rows), groups, constraints.bounds, allowed.base)
    if bounds:
        solve_within(np.array(rows["group"]), np.zeros(len(parts)), bounds)


def missed(
    groups: pl.DataFrame, formats: Mapping[str, str], bounds: BoundsSpec, base: str
) -> list[str]:
    """The bounds that a plan does not keep, such as `effective_bits 9.1 > 5`: those of plans that no program made."""
    told = []
    for name, most, of in (
        ("effective_bits", bounds.effective_bits, effective_bits),
        ("weight_bytes", bounds.weight_bytes, weight_bytes),
    ):
        if most and (value := of(groups, formats, base)) > most * (1 + 1e-12):
            told.append(f"{name} {value:.6g} > {most:.6g}")
    for name, least in bounds.min_share.items():
        share = list(formats.values()).count(name) / max(1, len(formats))
        if share < least and not math.isclose(share, least):
            told.append(f"share of {name} {share:.4g} < {least:.4g}")
    return told
