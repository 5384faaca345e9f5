"""What each configuration of each group gains, and what it costs in loss MSE: the program's coefficients (Sec. 2.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import polars as pl

from mpq.errors import MpqError
from mpq.formats.format import get_format
from mpq.program.solver import Solution, SolverName, solve
from mpq.store.tables import table

Losses = dict[tuple[str, str], float]  # (op, format) → loss MSE, nats²


def loss_by_op(sensitivity: pl.DataFrame, noise_model: str) -> Losses:
    """Loss MSE (nats²) of each op in each format, summed over its operands. Raises MpqError where one is not finite."""
    rows = (
        sensitivity.filter(pl.col("noise_model") == noise_model)
        .group_by("op", "format")
        .agg(pl.col("loss_mse").sum())
    )
    losses = {
        (op, name): loss for op, name, loss in rows.select("op", "format", "loss_mse").iter_rows()
    }
    for (op, name), loss in losses.items():
        if not math.isfinite(loss):
            raise MpqError(
                f"The sensitivity table has the loss MSE {loss} for {op} in {name}: measure sensitivity again."
            )
    return losses


def _loss(losses: Losses, op: str, name: str, base: str) -> float:
    if (op, name) not in losses:
        if name == base:
            return 0.0
        raise MpqError(
            f"The sensitivity table has no row for {op} in {name}: measure sensitivity with that format."
        )
    return losses[op, name]


def gains_et(
    groups: pl.DataFrame,
    timing: pl.DataFrame,
    sensitivity: pl.DataFrame,
    base: str,
    noise_model: str,
    bound: str = "median",
) -> pl.DataFrame:
    """IP-ET: seconds gained, measured for the group's signature (or, by the paper's way, for the group itself).

    `bound` says what of a gain counts: `median` (as measured), `lower` (its interval's lower end),
    `cautious` (the lower end where the interval includes zero), or `pooled` (what all of its
    signature's configurations say of it: design.complete). A configuration measured twice counts
    as it was the last time, unless pooled.
    """
    losses = loss_by_op(sensitivity, noise_model)
    if bound == "pooled" and "pooled_gain_s" not in timing.columns:
        raise MpqError(
            "The timing table has no pooled gains: expected what design.complete makes of it, or another bound."
        )
    measured: dict[str, dict[tuple[str, ...], float]] = {}
    for row in timing.iter_rows(named=True):
        unsure = row["gain_ci_low_s"] <= 0 <= row["gain_ci_high_s"]
        lower = bound == "lower" or (bound == "cautious" and unsure)
        counts = "pooled_gain_s" if bound == "pooled" else "gain_ci_low_s" if lower else "gain_s"
        measured.setdefault(row["signature"], {})[tuple(row["configuration"])] = row[counts]
    rows: list[dict[str, object]] = []
    for group in _groups(groups):
        of_signature = measured.get(group["signature"])
        if not of_signature:
            raise MpqError(
                f"The timing table has no row for {group['signature']} (group {group['group']}): time that signature."
            )
        for formats, gain in of_signature.items():
            every_base = all(f == base for f in formats)
            rows.append(
                _row(
                    "et",
                    group["group"],
                    formats,
                    0.0 if every_base else gain,
                    sum(
                        _loss(losses, op, f, base)
                        for op, f in zip(group["op"], formats, strict=True)
                    ),
                )
            )
    return table("gains", rows)


def gains_tt(
    groups: pl.DataFrame,
    sensitivity: pl.DataFrame,
    formats: Sequence[str],
    base: str,
    noise_model: str,
) -> pl.DataFrame:
    """IP-TT: BF16 MACs gained, Δ_f · MACs (eq. 28). It adds up over ops, so every op is a group of its own: the same
    optimum as with Fⁿ configurations a group, from F."""
    losses = loss_by_op(sensitivity, noise_model)
    rows = [
        _row(
            "tt",
            op["order"],
            (f,),
            (get_format(base).mac_time - get_format(f).mac_time) * op["macs"],
            _loss(losses, op["op"], f, base),
        )
        for op in groups.filter(pl.col("kind") != "other").sort("order").iter_rows(named=True)
        for f in dict.fromkeys((base, *formats))
    ]
    return table("gains", rows)


def gains_m(
    groups: pl.DataFrame,
    sensitivity: pl.DataFrame,
    formats: Sequence[str],
    base: str,
    noise_model: str,
) -> pl.DataFrame:
    """IP-M: bytes of weights gained (eqs. 29–30); linear ops only, every op its own group.

    A weight that is tied to the embedding stays there in base: lowered, it is a copy more and gains less than nothing.
    """
    losses = loss_by_op(sensitivity, noise_model)
    rows = [
        _row(
            "m",
            op["order"],
            (f,),
            _bytes_gained(op, base, f),
            _loss(losses, op["op"], f, base),
        )
        for op in groups.filter(pl.col("kind") == "linear").sort("order").iter_rows(named=True)
        for f in dict.fromkeys((base, *formats))
    ]
    return table("gains", rows)


def _bytes_gained(op: dict[str, Any], base: str, name: str) -> float:
    if name == base:
        return 0.0
    kept = 0.0 if op.get("tied") else get_format(base).bytes
    return float((kept - get_format(name).bytes) * op["parameters"])


def _groups(groups: pl.DataFrame) -> list[dict[str, Any]]:
    return list(
        groups.sort("order")
        .group_by("group", "signature", maintain_order=True)
        .agg("op", "kind")
        .iter_rows(named=True)
    )


def _row(
    objective: str, group: int, configuration: Sequence[str], gain: float, loss: float
) -> dict[str, object]:
    return {
        "objective": objective,
        "group": group,
        "configuration": list(configuration),
        "gain": gain,
        "loss_mse": loss,
    }


def solve_table(
    gains: pl.DataFrame, budget: float, solver: SolverName = "auto"
) -> tuple[pl.DataFrame, Solution]:
    """The chosen row of each group of a gains table, and the solution. Raises MpqError for a table that is no program."""
    missing = [c for c in ("group", "configuration", "gain", "loss_mse") if c not in gains.columns]
    if missing:
        raise MpqError(
            f"The gains table lacks {', '.join(missing)}: expected group, configuration, gain, loss_mse."
        )
    for name in ("group", "gain", "loss_mse"):
        if not (kind := gains[name].dtype).is_numeric():
            raise MpqError(f"The gains table has the column {name} as {kind}: expected numbers.")
        if not gains[name].is_finite().fill_null(False).all():
            raise MpqError(
                f"The gains table has a {name} that is no number (empty, NaN or infinite): expected one in every row."
            )
    if gains.is_empty():
        raise MpqError("The gains table is empty: expected a row for each group and configuration.")
    if "objective" in gains.columns and gains["objective"].n_unique() > 1:
        raise MpqError(
            f"The gains table holds several objectives ({', '.join(map(str, gains['objective'].unique()))}): choose one with --objective."
        )
    group = gains["group"].rank("dense").to_numpy().astype(int) - 1
    solution = solve(
        group, gains["gain"].to_numpy(), gains["loss_mse"].to_numpy(), budget, solver=solver
    )
    return gains[list(solution.chosen)], solution
