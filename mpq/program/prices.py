"""The price of each constraint: what a plan would gain and cost if that one did not hold, all others as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl

from mpq.program.anchors import Scale, scaled
from mpq.program.bounds import bound_rows, target_rows
from mpq.program.certainty import held_at
from mpq.program.gains import cost_known, least_cost, solve_table
from mpq.program.plan import LEAST_LOSS, Plan
from mpq.program.signed import SignedLoss, choices_of
from mpq.program.solver import SolverName
from mpq.spec import BoundsSpec, TargetSpec


def prices(
    plan: Plan,
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    without: Mapping[str, pl.DataFrame],
    *,
    bounds: BoundsSpec,
    target: TargetSpec | None = None,
    solver: SolverName = "auto",
    robust: float | None = None,
    scale: Scale = Scale(),
    signed: SignedLoss | None = None,
) -> list[dict[str, Any]]:
    """A row for each constraint of a plan that the program made: gain, loss MSE and KL (null where not measured) with it, and
    without it.

    `robust`, `scale` and `signed` are those under which the plan was chosen (strategies.choose). `without` is, for each rule,
    the gains table in which it does not hold; for et these hold predicted times where the constraints kept configurations from
    being measured.
    """
    rows = []
    for name, table, left in _loosened(groups, gains, without, bounds, plan.base):
        table = scaled(table, scale)
        further = bound_rows(table, groups, left, plan.base)
        if plan.strategy == LEAST_LOSS and target:
            aim = target_rows(table, groups, target, plan.base, plan.base_ttft_s)
            chosen, _ = least_cost(table, [*aim, *further], solver)
        else:
            held = held_at(table, robust, plan.budgets) if robust else table
            terms = signed.terms(choices_of(groups, table)) if signed else None
            _, solution = solve_table(held, plan.budgets, solver, further, terms)
            chosen = table[list(solution.chosen)]
        rows.append(
            {
                "strategy": plan.strategy,
                "objective": plan.objective,
                "tau": plan.tau,
                "constraint": name,
                "gain": plan.predicted_gain,
                "gain_without": math.fsum(chosen["gain"]),
                "loss_mse": plan.predicted_loss_mse,
                "loss_mse_without": _loss(groups, chosen, signed),
                "kl": plan.predicted_kl,
                "kl_without": math.fsum(chosen["kl"]) if cost_known(chosen) == "kl" else None,
            }
        )
    return rows


def _loss(groups: pl.DataFrame, chosen: pl.DataFrame, signed: SignedLoss | None) -> float:
    if signed is None:
        return math.fsum(chosen["loss_mse"])
    return signed.terms(choices_of(groups, chosen)).mse(np.arange(chosen.height))


def _loosened(
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    without: Mapping[str, pl.DataFrame],
    bounds: BoundsSpec,
    base: str,
) -> Iterator[tuple[str, pl.DataFrame, BoundsSpec]]:
    """Each constraint's name, with the gains table and the bounds that are left without it."""
    for name, table in without.items():
        yield name, table, bounds
    for key in ("effective_bits", "weight_bytes"):
        if getattr(bounds, key):
            (row,) = bound_rows(gains, groups, BoundsSpec(**{key: getattr(bounds, key)}), base)
            yield row.bound, gains, bounds.model_copy(update={key: None})
    for name, share in bounds.min_share.items():
        others = {f: s for f, s in bounds.min_share.items() if f != name}
        left = bounds.model_copy(update={"min_share": others})
        yield f"share of {name} ≥ {share:g}", gains, left
