"""From tables to plans: what each configuration gains and costs, and the choice among them for each τ."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import polars as pl

from mpq.program.solver import SolverName
from mpq.spec import Bound, Objective, ObjectiveSpec
from mpq.store.entries import TableRef
from mpq.store.tables import table
from mpq.tasks.stage import Output, read, read_together, stage


@stage("gains", name="gains")
def build_gains(
    objective: Objective,
    groups: TableRef,
    sensitivity: TableRef,
    timing: list[TableRef],
    formats: list[str],
    base: str,
    noise_model: str,
    bound: str,
    choices: dict[str, list[tuple[str, ...]]],
) -> Output:
    """The gains table of one objective: for each group and configuration its gain, loss MSE and KL.

    `choices` (et): for each signature what its ops may take; configurations that were not measured are predicted.
    """
    from mpq.program.gains import gains_et, gains_m, gains_tt
    from mpq.timing.design import complete

    tables = read(groups), read(sensitivity)
    if objective == "et":
        measured = complete(read_together(timing), choices, base)
        return {"gains": gains_et(tables[0], measured, tables[1], base, noise_model, bound)}
    build = gains_tt if objective == "tt" else gains_m
    return {"gains": build(tables[0], tables[1], formats, base, noise_model)}


@stage("plans", "solutions", "plan_files", free=["provenance"])
def solve(
    objective: Objective,
    part: ObjectiveSpec,
    groups: TableRef,
    gains: TableRef,
    loss: TableRef,
    timing: list[TableRef],
    bounds: list[Bound],
    base: str,
    solver: SolverName,
    fingerprint: str,
    provenance: dict[str, Any],
    anchor: TableRef | None = None,
) -> Output:
    """A plan for each strategy, bound and seed of one objective, and its uniform plans once.

    `anchor` is the measured TTFT of the plans of design.anchors.
    """
    from mpq.program.strategies import choose, gain_errors, uniform_plans
    from mpq.timing.design import anchors, interaction, neighbours, sums

    tables, mean_square = (read(groups), read(gains)), read(loss)["mean_square_loss"][0]
    measured = read_together(timing) if timing else table("timing", [])
    base_ttft: Any = measured["base_ttft_s"].median()
    term = 0.0
    if anchor:
        whole = anchors(*tables, base)
        pairs = [neighbours(tables[0], plan, base) for plan in whole]
        term = interaction(pairs, sums(*tables, whole, base), read(anchor)["gain_s"].to_list())
    solved = []
    if "uniform" in part.strategies:
        solved += uniform_plans(
            objective,
            *tables,
            mean_square_loss=mean_square,
            base=base,
            base_ttft_s=base_ttft,
            interaction=term,
        )
    for strategy in (s for s in part.strategies if s != "uniform"):
        name = f"ip_{objective}" if strategy == "ip" else strategy
        for seed in range(part.random_seeds if strategy == "random" else 1):
            for bound in bounds:
                solved.append(
                    choose(
                        name,
                        objective,
                        *tables,
                        tau=bound.tau,
                        kl=bound.kl,
                        mean_square_loss=mean_square,
                        base=base,
                        seed=seed,
                        solver=solver,
                        base_ttft_s=base_ttft,
                        interaction=term,
                    )
                )
    errors = gain_errors(tables[0], measured, [plan for plan, _ in solved])
    plans = [
        replace(plan, predicted_gain_error=e, fingerprint=fingerprint, provenance=provenance)
        for (plan, _), e in zip(solved, errors, strict=True)
    ]
    solutions = table("solutions", [row for _, row in solved])
    ops = [
        {
            "strategy": p.strategy,
            "objective": p.objective,
            "tau": p.tau,
            "seed": p.seed,
            "op": op,
            "format": f,
        }
        for p in plans
        for op, f in p.formats.items()
    ]
    return {
        "plans": table("plans", ops),
        "solutions": solutions.with_columns(
            pl.Series("predicted_gain_error", errors, dtype=pl.Float64)
        ),
        "plan_files": (json.dumps([asdict(p) for p in plans]).encode(), "json"),
    }
