"""What each configuration of each group gains, and what it costs in loss MSE and in KL divergence: the program's
coefficients (Sec. 2.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from mpq.errors import MpqError
from mpq.formats.format import get_format
from mpq.program.solver import Solution, SolverName, solve
from mpq.store.tables import table

Losses = dict[tuple[str, str], float]  # (op, format) → loss MSE, nats²
Cost = tuple[float | None, ...]  # loss MSE (nats²), KL (nats per token) and its standard error
COSTS = ("loss_mse", "kl", "kl_stderr")


class Costs:
    """What each op costs in each format, summed over its operands; base costs nothing where the table has no row for it."""

    def __init__(self, sensitivity: pl.DataFrame, noise_model: str, base: str) -> None:
        self.base = base
        of_kl = sensitivity.filter(pl.col("noise_model") == "actual")
        self.columns: list[dict[tuple[str, str], float]] = [
            loss_by_op(sensitivity, noise_model),
            *(_by_op(of_kl, c) if c in of_kl.columns else {} for c in COSTS[1:]),
        ]

    def of(self, ops: Sequence[str], formats: Sequence[str]) -> Cost:
        """The cost of ops in their formats; a KL that was not measured is None.

        Standard errors add as the KL does: samples that are hard for one op are hard for all, and the sum is never less
        than the plan's own. Raises MpqError where the table has no loss MSE.
        """
        pairs = list(zip(ops, formats, strict=True))
        loss = sum(_loss(self.columns[0], op, f, self.base) for op, f in pairs)
        return loss, *(self._sum(of, pairs) for of in self.columns[1:])

    def _sum(self, of: Losses, pairs: Sequence[tuple[str, str]]) -> float | None:
        if not of:
            return None
        found = [0.0 if f == self.base else of.get((op, f)) for op, f in pairs]
        return None if None in found else sum(v for v in found if v is not None)


def _by_op(rows: pl.DataFrame, column: str) -> Losses:
    summed = rows.drop_nulls(column).group_by("op", "format").agg(pl.col(column).sum())
    return {(op, name): v for op, name, v in summed.select("op", "format", column).iter_rows()}


def loss_by_op(sensitivity: pl.DataFrame, noise_model: str) -> Losses:
    """Loss MSE (nats²) of each op in each format, summed over its operands. Raises MpqError where one is not finite."""
    losses = _by_op(sensitivity.filter(pl.col("noise_model") == noise_model), "loss_mse")
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
    costs = Costs(sensitivity, noise_model, base)
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
                    costs.of(group["op"], formats),
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
    costs = Costs(sensitivity, noise_model, base)
    rows = [
        _row(
            "tt",
            op["order"],
            (f,),
            (get_format(base).mac_time - get_format(f).mac_time) * op["macs"],
            costs.of((op["op"],), (f,)),
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
    costs = Costs(sensitivity, noise_model, base)
    rows = [
        _row(
            "m",
            op["order"],
            (f,),
            _bytes_gained(op, base, f),
            costs.of((op["op"],), (f,)),
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
    objective: str, group: int, configuration: Sequence[str], gain: float, cost: Cost
) -> dict[str, object]:
    return {
        "objective": objective,
        "group": group,
        "configuration": list(configuration),
        "gain": gain,
        **dict(zip(COSTS, cost, strict=True)),
    }


def solve_table(
    gains: pl.DataFrame, budget: float, solver: SolverName = "auto", cost: str = "loss_mse"
) -> tuple[pl.DataFrame, Solution]:
    """The chosen row of each group of a gains table, and the solution, under Σ `cost` ≤ budget.

    Raises MpqError for a table that is no program.
    """
    needed = ("group", "configuration", "gain", cost)
    missing = [c for c in needed if c not in gains.columns]
    if missing:
        raise MpqError(f"The gains table lacks {', '.join(missing)}: expected {', '.join(needed)}.")
    for name in ("group", "gain", cost):
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
    solution = solve(group, gains["gain"].to_numpy(), gains[cost].to_numpy(), budget, solver=solver)
    return gains[list(solution.chosen)], solution


def solve_within(
    gains: pl.DataFrame, budgets: Mapping[str, float], solver: SolverName = "auto"
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """As solve_table under several bounds at once, column → budget; the facts of its `solutions` row.

    Each bound is tried alone: where its solution keeps the others, that is the optimum. Where none does, a row's cost is
    the largest share that it takes of any budget: plans within 1 keep every bound, though not each that does is found.
    """
    tightest = math.inf
    for cost, budget in budgets.items():
        rows, solution = solve_table(gains, budget, solver, cost)
        facts = {k: getattr(solution, k) for k in ("bound", "status", "solver", "seconds", "note")}
        if all(math.fsum(rows[c]) <= b for c, b in budgets.items()):
            return rows, facts
        tightest = min(tightest, solution.bound)
    share = pl.max_horizontal(pl.col(c) / b for c, b in budgets.items())
    rows, solution = solve_table(gains.with_columns(share=share), 1.0, solver, "share")
    note = f"{' and '.join(budgets)} bind together: the plan keeps both, another may gain more"
    facts |= {"bound": tightest, "status": "feasible", "seconds": solution.seconds, "note": note}
    return rows.drop("share"), facts
