"""How a plan is chosen: by the integer program (ip_et, ip_tt, ip_m), or by a baseline.

The paper's baselines (Sec. 3) lower ops in random or in model order until the bound is met.
Ours are what people run today: everything in one format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import polars as pl

from mpq.errors import MpqError
from mpq.program.anchors import Scale, scaled
from mpq.program.bounds import target_rows
from mpq.program.certainty import held_at
from mpq.program.choice import HEURISTIC, Chosen, Facts, Program, chosen_of, options_of
from mpq.program.gains import least_cost, solve_table
from mpq.program.plan import LEAST_LOSS, Plan
from mpq.program.signed import choices_of
from mpq.program.solver import Solution, SolverName
from mpq.program.walks import walk
from mpq.timing.design import half_widths

if TYPE_CHECKING:
    from mpq.spec import TargetSpec


def choose(
    strategy: str,
    objective: str,
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    *,
    tau: float | None = None,
    kl: float | None = None,
    seed: int = 0,
    solver: SolverName = "auto",
    robust: float | None = None,
    scale: Scale = Scale(),
    **facts: Unpack[Facts],
) -> tuple[Plan, dict[str, Any]]:
    """The plan of one strategy under τ, or a bound on KL (nats per token), or both; and its row of
    the `solutions` table.

    Random and Prefix walk over the ops. Each op takes the format that is fastest in theory and
    still fits the bounds; they stop at the first op that fits in none. The program's plan keeps
    `facts["bounds"]` too; of the others' plans the row notes which they miss. `scale` is what
    measured plans say of the predicted KL; with `robust` the bound is kept at that probability
    (certainty.held_at). Raises MpqError for a bound that is not above zero, for none, and where KL
    is bounded and was not measured; NoPlan where no plan keeps the bounds.
    """
    budgets = _budgets(gains, tau, kl, facts["mean_square_loss"])
    gains = scaled(gains, scale)
    held = held_at(gains, robust, budgets) if robust else gains
    program = Program(objective, groups, gains, **facts)
    tau, signed = program.tau_of(budgets) if tau is None else tau, program.signed
    if strategy in ("random", "prefix"):
        summed = {c: b for c, b in budgets.items() if not signed or c != "loss_mse"}

        def keeps(chosen: Chosen) -> bool:
            return program.loss(chosen) <= budgets.get("loss_mse", math.inf)

        further = keeps if signed else None
        chosen = walk(strategy, options_of(held), program.base, summed, seed, further)
        return program.plan(strategy, tau, budgets, chosen, seed, scale=scale)
    terms = signed.terms(choices_of(groups, gains)) if signed else None
    rows, solution = solve_table(held, budgets, solver, program.bound_rows, terms)
    return program.plan(strategy, tau, budgets, chosen_of(rows), seed, _facts(solution), scale)


def as_plan(
    objective: str,
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    solution: Solution,
    *,
    tau: float | None = None,
    kl: float | None = None,
    **facts: Unpack[Facts],
) -> Plan:
    """The plan that a solution of a gains table is (solve_table), which was found under τ or a bound
    on KL (nats per token). Raises MpqError as `choose` does."""
    budgets = _budgets(gains, tau, kl, facts["mean_square_loss"])
    program = Program(objective, groups, gains, **facts)
    tau, chosen = program.tau_of(budgets), chosen_of(gains[list(solution.chosen)])
    return program.plan(f"ip_{objective}", tau, budgets, chosen, solved=_facts(solution))[0]


def _budgets(
    gains: pl.DataFrame, tau: float | None, kl: float | None, mean_square_loss: float
) -> dict[str, float]:
    """What each column of the gains table may sum to."""
    if tau is None and kl is None:
        raise MpqError("A plan needs a bound: give τ, or a bound on KL, or both.")
    if tau is not None and not (tau > 0 and math.isfinite(tau)):
        raise MpqError(
            f"τ must be above zero, got {tau:g}: it is the normalised RMSE of the loss that the "
            "plan may have."
        )
    if kl is not None and not (kl > 0 and math.isfinite(kl)):
        raise MpqError(
            f"The bound on KL must be above zero, got {kl:g}: it is the divergence from base, in "
            "nats per token, that the plan may have."
        )
    if kl is not None and ("kl" not in gains.columns or gains["kl"].null_count()):
        raise MpqError(
            "The gains table has no kl, or not for every configuration: measure sensitivity "
            "again, or bound τ instead."
        )
    of_loss = {} if tau is None else {"loss_mse": tau**2 * mean_square_loss}
    return of_loss if kl is None else {**of_loss, "kl": kl}


def least_loss_plan(
    objective: str,
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    target: TargetSpec,
    *,
    solver: SolverName = "auto",
    scale: Scale = Scale(),
    **facts: Unpack[Facts],
) -> tuple[Plan, dict[str, Any]]:
    """The plan of the smallest predicted KL that meets a target and keeps `bounds`: `ip_loss`. Where
    KL was not measured, that of the smallest loss MSE.

    A time is met by the sum of the groups' gains; what lowered neighbours gain together comes on
    top. `tau` is the one that the predicted loss d just meets, √(d / E[g²]), and `budget` is d.
    Raises NoPlan where no plan keeps the bounds, MpqError for a time without measured ones.
    """
    gains = scaled(gains, scale)
    program = Program(objective, groups, gains, **facts)
    wanted = target_rows(gains, groups, target, program.base, program.base_ttft_s)
    rows, solution = least_cost(gains, [*wanted, *program.bound_rows], solver)
    solved = _facts(solution) | {"bound": None}
    return _unbounded(program, LEAST_LOSS, chosen_of(rows), scale, solved)


def _unbounded(
    program: Program,
    strategy: str,
    chosen: Chosen,
    scale: Scale,
    solved: Mapping[str, Any] = HEURISTIC,
) -> tuple[Plan, dict[str, Any]]:
    """A plan that was given no τ, under the one that its predicted loss just meets."""
    budgets = {"loss_mse": program.loss(chosen)}
    tau = program.tau_of(budgets)
    return program.plan(strategy, tau, budgets, chosen, solved=solved, scale=scale)


def _facts(solution: Solution) -> dict[str, Any]:
    return {k: getattr(solution, k) for k in ("bound", "status", "solver", "seconds", "note")}


def uniform_plans(
    objective: str,
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    *,
    scale: Scale = Scale(),
    **facts: Unpack[Facts],
) -> list[tuple[Plan, dict[str, Any]]]:
    """What people run today: everything in one format, and everything but the model's head.

    For each format of the gains table a plan `uniform_<format>`, and where that lowers the head
    and more `uniform_<format>_but_head`; each with its row of the `solutions` table. Ops that the
    table cannot lower to the format stay in base. No τ was asked for: `tau` is the one that the
    predicted loss MSE d just meets, √(d / E[g²]), and `budget` is d.
    """
    gains = scaled(gains, scale)
    program = Program(objective, groups, gains, **facts)
    head = head_of(groups)
    formats = {f for of in program.options.values() for c in of for f in c} - {program.base}
    plans = []
    for f in sorted(formats):
        whole = program.in_one_format(f)
        plans.append((f"uniform_{f}", whole))
        but_head = program.in_one_format(f, kept=head)
        if but_head != whole and any(f in c for c in but_head.values()):
            plans.append((f"uniform_{f}_but_head", but_head))
    return [_unbounded(program, name, chosen, scale) for name, chosen in plans]


def head_of(groups: pl.DataFrame) -> str | None:
    """The model's last op where it stands outside the numbered layers: lm_head, embed_out, …"""
    last = groups.sort("order")["op"].tail(1).to_list()
    return next((op for op in last if not re.search(r"(^|\.)\d+\.", op)), None)


def gain_errors(
    groups: pl.DataFrame, timing: pl.DataFrame, plans: Sequence[Plan]
) -> list[float | None]:
    """For each plan half the 95 % interval (s) of its predicted time gain; None where the table
    lacks one of its configurations, or the plan gains no time that was measured."""
    return [_gain_error(groups, timing, plan) for plan in plans]


def _gain_error(groups: pl.DataFrame, timing: pl.DataFrame, plan: Plan) -> float | None:
    if plan.objective != "et" or timing.is_empty():
        return None
    try:
        return half_widths(groups, timing, [plan.formats], plan.base)[0]
    except KeyError:
        return None
