"""From tables to plans: what each configuration gains and costs, and the choice among them for each τ."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import polars as pl

from mpq.errors import MpqError
from mpq.program.anchors import Measured, Scale
from mpq.program.constraints import Allowed
from mpq.program.memory import Requests
from mpq.program.plan import Plan
from mpq.program.solver import NoPlan, SolverName
from mpq.spec import Bound, BoundsSpec, EngineName, Objective, ObjectiveSpec, TargetSpec
from mpq.store.entries import TableRef
from mpq.store.tables import table
from mpq.tasks.stage import Output, read, read_json, read_together, stage
from mpq.timing.options import Options

log = logging.getLogger("mpq")
# where several tokens were timed, and where the cache was decided
_OF_SOME = ("output", "base_tpot_s", "predicted_tpot_s", "cache_bytes", "base_cache_bytes")


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
    allowed: Allowed,
    requests: Requests | None = None,
) -> Output:
    """The gains table of one objective: for each group and configuration its gain, loss MSE and KL.

    Those alone that are `allowed`; for et, configurations that were not measured are predicted; for m, `requests` say what is in
    the cache where that is decided.
    """
    from mpq.program.constraints import options_by_signature
    from mpq.program.gains import gains_et, gains_m, gains_tt
    from mpq.timing.design import complete

    tables = read(groups), read(sensitivity)
    if objective == "et":
        options = options_by_signature(tables[0], allowed)
        measured = complete(read_together(timing), options, base)
        return {
            "gains": gains_et(tables[0], measured, tables[1], base, noise_model, bound, allowed)
        }
    if objective == "tt":
        return {"gains": gains_tt(*tables, formats, base, noise_model, allowed)}
    return {"gains": gains_m(*tables, formats, base, noise_model, allowed, requests)}


@stage("uncertain", name="what is uncertain")
def find_uncertain(
    timing: list[TableRef],
    choices: Mapping[str, Sequence[Options]],
    base: str,
    target: float,
    at_most: int,
) -> Output:
    """What to measure next, as (signature, configuration): see design.uncertain."""
    from mpq.timing.design import uncertain

    wanted = uncertain(read_together(timing), choices, base, target, at_most)
    return {"uncertain": (json.dumps(wanted).encode(), "json")}


@stage("plans", "solutions", "plan_files", "prices", free=["provenance"])
def solve(
    objective: Objective,
    part: ObjectiveSpec,
    groups: TableRef,
    gains: TableRef,
    loss: TableRef,
    timing: list[TableRef],
    limits: list[Bound],
    base: str,
    solver: SolverName,
    fingerprint: str,
    provenance: dict[str, Any],
    anchor: TableRef | None = None,
    engine: EngineName = "none",
    bounds: BoundsSpec = BoundsSpec(),
    target: TargetSpec | None = None,
    without: dict[str, TableRef] | None = None,
    scales: list[Scale] | None = None,
    sensitivity: TableRef | None = None,
    effects: TableRef | None = None,
) -> Output:
    """A plan for each strategy, limit and seed of one objective, its uniform plans once, and that of the smallest cost for
    a target.

    `limits` are what KL or τ bounds; one under which no plan keeps the `bounds` is left out with a
    warning; where none has a plan, that is a mistake. `without` are the gains tables in which one rule does not hold, by its
    name: what each constraint costs goes into a table and each plan's provenance. `scales` are what measured plans say of the
    predicted KL, one for each limit. `sensitivity` and `effects` tell the loss MSE with rounding's signs. `anchor` is the
    measured TTFT of the plans of design.anchors.
    """
    from mpq.program.prices import prices
    from mpq.program.signed import signed_loss, warn_few
    from mpq.program.strategies import choose, gain_errors, least_loss_plan, uniform_plans
    from mpq.timing.answer import answers, further_of
    from mpq.timing.design import anchors, interaction, neighbours, sums

    tables, mean_square = (read(groups), read(gains)), read(loss)["mean_square_loss"][0]
    signed = None
    if sensitivity and effects:
        signed = signed_loss(read(sensitivity), read(effects), base)
    asked = any(limit.signed for limit in limits)
    if asked and not signed:
        raise MpqError("A bound with signs needs the tables sensitivity and effects: give both.")
    if asked and signed:
        warn_few(signed, tables[1]["group"].n_unique())
    measured = read_together(timing) if timing else table("timing", [])
    base_ttft: Any = measured["base_ttft_s"].median()
    term, of_tokens = 0.0, 0.0
    if anchor:
        whole = anchors(*tables, base)
        pairs = [neighbours(tables[0], plan, base) for plan in whole]
        of_anchors = read(anchor)
        term = interaction(pairs, sums(*tables, whole, base), of_anchors["gain_s"].to_list())
        if answers(of_anchors):
            added = sums(*tables, whole, base, "tpot_gain")
            of_tokens = interaction(pairs, added, of_anchors["tpot_gain_s"].to_list())
    how: dict[str, Any] = {
        "mean_square_loss": mean_square,
        "base": base,
        "base_ttft_s": base_ttft,
        "interaction": term,
        "further": further_of(measured, of_tokens),
        "bounds": bounds,
        "engine": engine,
        "signed": signed if asked else None,
    }
    under = list(zip(limits, scales or [Scale()] * len(limits), strict=True))
    robust = limits[0].robust if limits else None
    # of plans without a limit of their own: what all measured plans say, not those that were over theirs
    common = min((scale for _, scale in under), key=lambda s: s.value, default=Scale())
    solved = []
    if target and (objective == "et" or target.ttft_ms is None):
        least = least_loss_plan(objective, *tables, target, solver=solver, scale=common, **how)
        solved.append(least)
    if "uniform" in part.strategies:
        solved += uniform_plans(objective, *tables, scale=common, **how)
    refused: list[NoPlan] = []
    for strategy in (s for s in part.strategies if s != "uniform"):
        name = f"ip_{objective}" if strategy == "ip" else strategy
        for seed in range(part.random_seeds if strategy == "random" else 1):
            for limit, scale in under:
                try:
                    solved.append(
                        choose(
                            name,
                            objective,
                            *tables,
                            tau=limit.tau,
                            kl=limit.kl,
                            robust=limit.robust,
                            scale=scale,
                            seed=seed,
                            solver=solver,
                            **how,
                        )
                    )
                except NoPlan as why:
                    log.warning("No %s plan for %s under %s: %s", name, objective, limit, why)
                    refused.append(why)
    if refused and not any(plan.strategy.startswith("ip_") for plan, _ in solved):
        raise refused[-1]  # of the loosest limit
    errors = gain_errors(tables[0], measured, [plan for plan, _ in solved])
    loosened = {name: read(ref) for name, ref in (without or {}).items()}
    priced: list[list[dict[str, Any]]] = []
    for plan, _ in solved:
        of_plan: list[dict[str, Any]] = []
        if plan.strategy.startswith("ip_"):
            of_plan = prices(
                plan,
                *tables,
                loosened,
                bounds=bounds,
                target=target,
                solver=solver,
                robust=robust,
                scale=Scale(plan.kl_scale, plan.kl_scale_error),
                signed=how["signed"],
            )
        priced.append(of_plan)
    plans = [
        replace(
            plan,
            predicted_gain_error=e,
            predicted_signed_mse=signed.of(plan.formats) if signed else None,
            fingerprint=fingerprint,
            provenance={**provenance, **({"prices": own} if own else {})},
        )
        for (plan, _), e, own in zip(solved, errors, priced, strict=True)
    ]
    solutions = table("solutions", [row for _, row in solved])
    return {
        "plans": _ops_of(plans),
        "solutions": solutions.with_columns(
            pl.Series("predicted_gain_error", errors, dtype=pl.Float64),
            pl.Series("predicted_signed_mse", [p.predicted_signed_mse for p in plans], pl.Float64),
            *(
                pl.Series(name, [row[name] for _, row in solved], dtype=pl.Float64)
                for name in ("effective_bits", "weight_bytes", *_OF_SOME)
                if all(name in row for _, row in solved)
            ),
        ),
        "prices": table("prices", [row for own in priced for row in own]),
        "plan_files": (json.dumps([asdict(p) for p in plans]).encode(), "json"),
    }


@stage("plans", "solutions", "plan_files", name="deliver")
def deliver(
    plan_files: list[TableRef],
    solutions: TableRef,
    measured: list[Measured],
    robust: float | None,
    text: str,
) -> Output:
    """The plans of the last of several rounds of solving, those under a bound on KL replaced by the one that gains most of
    all that were `measured` inside it; where none is, they stay and say so. `text` is what they were measured on."""
    from mpq.program.checking import delivered

    rounds = [[Plan(**p) for p in read_json(each)] for each in plan_files]
    before, plans, rows = read(solutions), [], []
    for plan, row in zip(rounds[-1], before.iter_rows(named=True), strict=True):
        checked = delivered(plan, rounds, measured, robust, text)
        own = {k: getattr(checked, k) for k in row if hasattr(checked, k)}
        notes = (row["note"], checked.provenance.get("check", {}).get("note"))
        rows.append({**row, **own, "note": " ".join(note for note in notes if note)})
        plans.append(checked)
    return {
        "plans": _ops_of(plans),
        "solutions": pl.DataFrame(rows, schema=before.schema),
        "plan_files": (json.dumps([asdict(p) for p in plans]).encode(), "json"),
    }


def _ops_of(plans: list[Plan]) -> pl.DataFrame:
    """The `plans` table: a row for each op of each plan."""
    rows = [
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
    return table("plans", rows)
