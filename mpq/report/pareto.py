"""The frontier of a finished run: every Pareto-optimal plan of gain against KL, or loss MSE."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import polars as pl

from mpq.errors import MpqError
from mpq.program.anchors import Scale, scaled
from mpq.program.bounds import bound_rows
from mpq.program.choice import Program, chosen_of
from mpq.program.frontier import Point, frontier
from mpq.program.gains import cost_known, fitting
from mpq.program.plan import Plan
from mpq.report.results import OBJECTIVES, Tables, scale_of
from mpq.spec import BoundsSpec
from mpq.timing.answer import Further
from mpq.timing.design import members

Cost = Literal["kl", "loss_mse"]


@dataclass(frozen=True)
class Pareto:
    """The points of one objective's frontier, and the tables that they are of.

    The KL in `gains` is already scaled by what measured plans said of it, `scale`.
    """

    objective: str
    cost: Cost
    base: str
    groups: pl.DataFrame
    gains: pl.DataFrame
    points: list[Point]
    scale: Scale


def pareto_of(
    tables: Tables,
    base: str,
    *,
    objective: str | None = None,
    cost: Cost | None = None,
    points: int = 200,
    bounds: BoundsSpec | None = None,
) -> Pareto:
    """The frontier of an objective of a run (the first, if left out), against KL where it is known.

    `bounds` hold in every plan; ties and pins do too, since the gains table has no others. Raises
    MpqError for a run without gains, and for an objective or a cost that it does not have; NoPlan
    where nothing keeps the bounds.
    """
    for name in ("gains", "groups"):
        if name not in tables or tables[name].is_empty():
            raise MpqError(
                f"The run has no {name} table: it was made by an earlier version. Run its spec again, what is whole is re-used."
            )
    there = [o for o in OBJECTIVES if o in tables["gains"]["objective"]]
    if objective is not None and objective not in there:
        raise MpqError(f"The run has no objective {objective}: expected {' or '.join(there)}.")
    chosen = objective or there[0]
    gains = fitting(tables["gains"].filter(objective=chosen), tables["groups"])
    known = cost_known(gains)
    if cost == "kl" and known != "kl":
        raise MpqError("The run's gains have no KL: run its spec again, or ask for loss_mse.")
    column: Cost = cost or ("kl" if known == "kl" else "loss_mse")
    scale = scale_of(tables, chosen)
    gains = scaled(gains, scale)
    further = bound_rows(gains, tables["groups"], bounds, base) if bounds else []
    found = frontier(
        gains["group"].to_numpy(),
        gains["gain"].to_numpy(),
        gains[column].to_numpy(),
        points,
        further,
    )
    return Pareto(chosen, column, base, tables["groups"], gains, found, scale)


def table_of_points(pareto: Pareto) -> pl.DataFrame:
    """A row for each point: its number, its gain (in the tables' unit) and what it costs, the upper
    bound of the gain at this cost, ops lowered, and the change of one group that costs least for
    what it gains."""
    gains, of = pareto.gains, members(pareto.groups, pareto.gains)
    configurations, group = gains["configuration"].to_list(), gains["group"].to_list()
    rows = []
    for number, point in enumerate(pareto.points):
        chosen = {group[r]: configurations[r] for r in point.rows}
        lowered = sum(f != pareto.base for c in chosen.values() for f in c)
        step, change = point.step, None
        if step:
            there = zip(
                of[group[step.row]], chosen[group[step.row]], configurations[step.row], strict=True
            )
            change = ", ".join(f"{op} {was} → {now}" for op, was, now in there if was != now)
        rows.append(
            {
                "point": number,
                "gain": point.gain,
                "bound": point.bound,
                "certified": point.certified,
                **_sums(gains, point),
                "ops_lowered": lowered,
                "next": change,
                "next_gain": step and step.gain,
                "next_cost": step and step.cost,
            }
        )
    # of a single point nothing is next
    absent = {"next": pl.String, "next_gain": pl.Float64, "next_cost": pl.Float64}
    return pl.DataFrame(rows, schema_overrides=absent, infer_schema_length=None)


def _sums(gains: pl.DataFrame, point: Point) -> dict[str, float | None]:
    chosen = gains[list(point.rows)]
    found: dict[str, float | None] = {}
    for column in ("kl", "kl_stderr", "loss_mse", "loss_mse_stderr"):
        known = column in chosen.columns and not chosen[column].null_count()
        found[column] = float(chosen[column].sum()) if known else None
    return found


def plan_at(pareto: Pareto, number: int, mean_square_loss: float, like: Plan | None = None) -> Plan:
    """The plan of a point; its bound is what the point costs. `like` is another plan of the run: where it was made under the
    same scale of KL, it says how far that errs.

    Raises MpqError for a number that the frontier does not have.
    """
    if not 0 <= number < len(pareto.points):
        raise MpqError(
            f"The frontier has no point {number}: expected 0 to {len(pareto.points) - 1}."
        )
    point, scale, gains = pareto.points[number], pareto.scale, pareto.gains
    if like and like.kl_scale == scale.value and "kl_stderr" in gains.columns:
        scale = replace(scale, error=like.kl_scale_error)
        # of the KL that is scaled already, as anchors.scaled has it
        more = scale.error * pl.col("kl")
        gains = gains.with_columns(kl_stderr=pl.col("kl_stderr") + more)
    program = Program(
        pareto.objective,
        pareto.groups,
        gains,
        mean_square_loss,
        pareto.base,
        base_ttft_s=like.base_ttft_s if like else None,
        further=Further(like.output, like.base_tpot_s) if like and like.base_tpot_s else None,
        engine=like.engine if like else "none",  # type: ignore[arg-type]
    )
    budgets: dict[str, float] = {pareto.cost: point.cost}
    plan, _ = program.plan(
        f"ip_{pareto.objective}",
        program.tau_of(budgets),
        budgets,
        chosen_of(gains[list(point.rows)]),
        scale=scale,
    )
    if like is None:
        return plan
    own = {k: v for k, v in like.provenance.items() if k not in ("check", "prices")}
    return replace(plan, fingerprint=like.fingerprint, provenance=own)
