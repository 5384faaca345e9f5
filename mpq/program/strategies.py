"""How a plan is chosen: the integer program (ip_et, ip_tt, ip_m), and the baselines random and prefix (Sec. 3)."""

from __future__ import annotations

import math
import random
from typing import Any

import polars as pl

from mpq.errors import MpqError
from mpq.formats.format import get_format
from mpq.program.gains import solve_table
from mpq.program.plan import Plan
from mpq.program.solver import SolverName
from mpq.timing.design import neighbours
from mpq.timing.plausible import implausible

Rows = dict[tuple[str, ...], tuple[float, float]]  # configuration → gain, loss MSE


def choose(
    strategy: str,
    objective: str,
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    *,
    tau: float,
    mean_square_loss: float,
    base: str,
    seed: int = 0,
    solver: SolverName = "auto",
    base_ttft_s: float | None = None,
    interaction: float = 0.0,
) -> tuple[Plan, dict[str, Any]]:
    """The plan of one strategy under τ, and its row of the `solutions` table.

    Random and Prefix walk over the ops, each taking the theoretically fastest format that still fits under τ² E[g²], and
    stop at the first op that fits in none. `interaction` (s) corrects the predicted TTFT
    for lowered neighbours (design.interaction). Raises MpqError for a τ that is not above zero.
    """
    if not (tau > 0 and math.isfinite(tau)):
        raise MpqError(
            f"τ must be above zero, got {tau:g}: it is the normalised RMSE of the loss that the plan may have."
        )
    budget = tau**2 * mean_square_loss
    members = _members(groups, gains)
    options: dict[int, Rows] = {}
    for row in gains.iter_rows(named=True):
        options.setdefault(row["group"], {})[tuple(row["configuration"])] = (
            row["gain"],
            row["loss_mse"],
        )
    facts: dict[str, Any] = {
        "bound": None,
        "status": "heuristic",
        "solver": "none",
        "seconds": 0.0,
        "note": "",
    }
    if strategy in ("random", "prefix"):
        chosen = _walk(strategy, members, options, base, budget, seed)
    else:
        rows, solution = solve_table(gains, budget, solver)
        chosen = {row["group"]: tuple(row["configuration"]) for row in rows.iter_rows(named=True)}
        facts = {k: getattr(solution, k) for k in ("bound", "status", "solver", "seconds", "note")}
    formats = {
        op: f
        for group, configuration in chosen.items()
        for op, f in zip(members[group], configuration, strict=True)
    }
    gain = math.fsum(options[g][c][0] for g, c in chosen.items())
    loss = math.fsum(options[g][c][1] for g, c in chosen.items())
    ttft = None
    if objective == "et" and base_ttft_s is not None:
        ttft = base_ttft_s - gain - interaction * neighbours(groups, formats, base)
    doubt = implausible(ttft, base_ttft_s, formats.values(), base)
    facts["note"] = " ".join(part for part in (facts["note"], doubt) if part)
    plan = Plan(
        strategy,
        objective,
        tau,
        base,
        formats,
        loss,
        budget,
        gain,
        mean_square_loss,
        seed,
        base_ttft_s,
        ttft,
    )
    row = {
        "strategy": strategy,
        "objective": objective,
        "tau": tau,
        "seed": seed,
        "predicted_loss_mse": loss,
        "budget": budget,
        "predicted_gain": gain,
        "share_lowered": plan.share_lowered,
        "predicted_ttft_s": ttft,
        "base_ttft_s": base_ttft_s,
        **facts,
    }
    return plan, row


def _members(groups: pl.DataFrame, gains: pl.DataFrame) -> dict[int, list[str]]:
    """Ops of each group of the gains table: sequential groups, or one op each where the objective adds up over ops."""
    ordered = groups.sort("order")
    if gains["objective"][0] == "et":
        return {
            g[0]: rows["op"].to_list()
            for g, rows in ordered.group_by(["group"], maintain_order=True)
        }
    return {order: [op] for order, op in ordered.select("order", "op").iter_rows()}


def _walk(
    strategy: str,
    members: dict[int, list[str]],
    options: dict[int, Rows],
    base: str,
    budget: float,
    seed: int,
) -> dict[int, tuple[str, ...]]:
    chosen = {group: (base,) * len(members[group]) for group in options}
    spent = {group: options[group][chosen[group]][1] for group in options}
    places = [(group, i) for group in options for i in range(len(members[group]))]
    if strategy == "random":
        random.Random(seed).shuffle(places)
    for group, i in places:
        candidates = [
            c
            for f in _by_speed(options[group], i, base)
            if (c := (*chosen[group][:i], f, *chosen[group][i + 1 :])) in options[group]
        ]
        if not candidates:
            continue  # an op that cannot be lowered stands in nobody's way
        others = math.fsum(loss for g, loss in spent.items() if g != group)
        fitting = next((c for c in candidates if others + options[group][c][1] <= budget), None)
        if fitting is None:
            break
        chosen[group], spent[group] = fitting, options[group][fitting][1]
    return chosen


def _by_speed(options: Rows, i: int, base: str) -> list[str]:
    names = {c[i] for c in options} - {base}
    return sorted(names, key=lambda f: (get_format(f).mac_time, -get_format(f).mantissa_bits, f))
