"""How a plan is chosen: by the integer program (ip_et, ip_tt, ip_m), or by a baseline.

The paper's baselines (Sec. 3) lower ops in random or in model order until the bound is met.
Ours are what people run today: everything in one format.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from mpq.errors import MpqError
from mpq.formats.scheme import get_scheme, mac_time
from mpq.program.anchors import Scale, scaled
from mpq.program.bounds import bound_rows, missed, target_rows
from mpq.program.certainty import ERRORS, HALF, held_at, risk
from mpq.program.gains import NAMES, least_cost, solve_table
from mpq.program.memory import effective_bits, weight_bytes
from mpq.program.plan import LEAST_LOSS, Plan, has_tau
from mpq.program.solver import Solution, SolverName, no_plan
from mpq.timing.answer import Further
from mpq.timing.design import half_widths, members, neighbours
from mpq.timing.plausible import implausible

if TYPE_CHECKING:
    from mpq.spec import BoundsSpec, EngineName, TargetSpec

Rows = dict[tuple[str, ...], Mapping[str, Any]]  # configuration → its row of the gains table
Chosen = dict[int, tuple[str, ...]]  # group → its configuration
HEURISTIC = {"bound": None, "status": "heuristic", "solver": "none", "seconds": 0.0, "note": ""}


def choose(
    strategy: str,
    objective: str,
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    *,
    tau: float | None = None,
    kl: float | None = None,
    mean_square_loss: float,
    base: str,
    seed: int = 0,
    solver: SolverName = "auto",
    base_ttft_s: float | None = None,
    interaction: float = 0.0,
    further: Further | None = None,
    bounds: BoundsSpec | None = None,
    engine: EngineName = "none",
    robust: float | None = None,
    scale: Scale = Scale(),
) -> tuple[Plan, dict[str, Any]]:
    """The plan of one strategy under τ, or a bound on KL (nats per token), or both; and its row of
    the `solutions` table.

    Random and Prefix walk over the ops. Each op takes the format that is fastest in theory and
    still fits the bounds; they stop at the first op that fits in none. `interaction` (s)
    corrects the predicted TTFT for lowered neighbours (design.interaction); where whole answers were timed, their time, and
    `further` tells of the tokens after the first. The program's plan
    keeps `bounds` too; of the others' plans the row notes which they miss. `scale` is what
    measured plans say of the predicted KL; with `robust` the bound is kept at that probability
    (certainty.held_at). Raises MpqError for a
    bound that is not above zero, for none, and where KL is bounded and was not measured; NoPlan
    where no plan keeps the bounds.
    """
    budgets = _budgets(gains, tau, kl, mean_square_loss)
    if tau is None:
        tau = budgets["kl"] / math.sqrt(mean_square_loss)  # as the loss moves, if it moves by κ
    gains = scaled(gains, scale)
    held = held_at(gains, robust, budgets) if robust else gains
    program = _Program(
        objective,
        groups,
        gains,
        mean_square_loss,
        base,
        base_ttft_s,
        interaction,
        bounds,
        engine,
        further,
    )
    if strategy in ("random", "prefix"):
        chosen = _walk(strategy, _options(held), base, budgets, seed)
        return program.plan(strategy, tau, budgets, chosen, seed, scale=scale)
    bounding = bound_rows(gains, groups, bounds, base) if bounds else []
    rows, solution = solve_table(held, budgets, solver, bounding)
    return program.plan(strategy, tau, budgets, _chosen(rows), seed, _facts(solution), scale)


def plan_of(
    objective: str,
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    rows: Sequence[int],
    budgets: Mapping[str, float],
    *,
    mean_square_loss: float,
    base: str,
    base_ttft_s: float | None = None,
    further: Further | None = None,
    engine: EngineName = "none",
    scale: Scale = Scale(),
) -> Plan:
    """The plan of chosen rows of a gains table, one of each group, its KL under `scale` already; `budgets` is what bounds it
    (by column, loss_mse or kl)."""
    program = _Program(
        objective, groups, gains, mean_square_loss, base, base_ttft_s, 0.0, None, engine, further
    )
    chosen = _chosen(gains[list(rows)])
    if "loss_mse" in budgets:
        tau = math.sqrt(max(0.0, budgets["loss_mse"]) / mean_square_loss)
    else:
        tau = budgets["kl"] / math.sqrt(mean_square_loss)
    return program.plan(f"ip_{objective}", tau, budgets, chosen, scale=scale)[0]


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
    mean_square_loss: float,
    base: str,
    solver: SolverName = "auto",
    base_ttft_s: float | None = None,
    interaction: float = 0.0,
    further: Further | None = None,
    bounds: BoundsSpec | None = None,
    engine: EngineName = "none",
    scale: Scale = Scale(),
) -> tuple[Plan, dict[str, Any]]:
    """The plan of the smallest predicted KL that meets a target and keeps `bounds`: `ip_loss`. Where
    KL was not measured, that of the smallest loss MSE.

    A time is met by the sum of the groups' gains; what lowered neighbours gain together comes on
    top. `tau` is the one that the predicted loss d just meets, √(d / E[g²]), and `budget` is d.
    Raises NoPlan where no plan keeps the bounds, MpqError for a time without measured ones.
    """
    gains = scaled(gains, scale)
    program = _Program(
        objective,
        groups,
        gains,
        mean_square_loss,
        base,
        base_ttft_s,
        interaction,
        bounds,
        engine,
        further,
    )
    bounding = target_rows(gains, groups, target, base, base_ttft_s)
    bounding += bound_rows(gains, groups, bounds, base) if bounds else []
    rows, solution = least_cost(gains, bounding, solver)
    chosen = _chosen(rows)
    loss = program.sure(chosen, "loss_mse")
    tau = math.sqrt(max(0.0, loss) / mean_square_loss)
    solved = _facts(solution) | {"bound": None}
    return program.plan(LEAST_LOSS, tau, {"loss_mse": loss}, chosen, solved=solved, scale=scale)


def _chosen(rows: pl.DataFrame) -> Chosen:
    return {g: tuple(c) for g, c in rows.select("group", "configuration").iter_rows()}


def _facts(solution: Solution) -> dict[str, Any]:
    return {k: getattr(solution, k) for k in ("bound", "status", "solver", "seconds", "note")}


def uniform_plans(
    objective: str,
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    *,
    mean_square_loss: float,
    base: str,
    base_ttft_s: float | None = None,
    interaction: float = 0.0,
    further: Further | None = None,
    bounds: BoundsSpec | None = None,
    engine: EngineName = "none",
    scale: Scale = Scale(),
) -> list[tuple[Plan, dict[str, Any]]]:
    """What people run today: everything in one format, and everything but the model's head.

    For each format of the gains table a plan `uniform_<format>`, and where that lowers the head
    and more `uniform_<format>_but_head`; each with its row of the `solutions` table. Ops that the
    table cannot lower to the format stay in base. No τ was asked for: `tau` is the one that the
    predicted loss MSE d just meets, √(d / E[g²]), and `budget` is d.
    """
    gains = scaled(gains, scale)
    program = _Program(
        objective,
        groups,
        gains,
        mean_square_loss,
        base,
        base_ttft_s,
        interaction,
        bounds,
        engine,
        further,
    )
    head = _head(groups)
    formats = sorted({f for of in program.options.values() for c in of for f in c} - {base})
    plans = []
    for f in formats:
        whole = program.in_one_format(f)
        plans.append((f"uniform_{f}", whole))
        but_head = program.in_one_format(f, kept=head)
        if but_head != whole and any(f in c for c in but_head.values()):
            plans.append((f"uniform_{f}_but_head", but_head))
    made = []
    for name, chosen in plans:
        loss = program.sure(chosen, "loss_mse")
        tau = math.sqrt(max(0.0, loss) / mean_square_loss)
        made.append(program.plan(name, tau, {"loss_mse": loss}, chosen, scale=scale))
    return made


def _head(groups: pl.DataFrame) -> str | None:
    """The model's last op where it stands outside the numbered layers: lm_head, embed_out, …"""
    last = groups.sort("order")["op"].tail(1).to_list()
    return next((op for op in last if not re.search(r"(^|\.)\d+\.", op)), None)


class _Program:
    """One objective's options, and how a choice among them becomes a plan."""

    def __init__(
        self,
        objective: str,
        groups: pl.DataFrame,
        gains: pl.DataFrame,
        mean_square_loss: float,
        base: str,
        base_ttft_s: float | None,
        interaction: float,
        bounds: BoundsSpec | None,
        engine: EngineName,
        further: Further | None,
    ):
        self.further = further
        self.bounds, self.engine = bounds, engine
        self.objective, self.groups, self.base = objective, groups, base
        self.mean_square_loss, self.base_ttft_s = mean_square_loss, base_ttft_s
        self.interaction = interaction
        self.members, self.options = members(groups, gains), _options(gains)

    def total(self, chosen: Chosen, column: str) -> float | None:
        """The sum of a column over the chosen configurations; None where one of them has none."""
        values = [self.options[g][c].get(column) for g, c in chosen.items()]
        return None if None in values else math.fsum(v for v in values if v is not None)

    def sure(self, chosen: Chosen, column: str) -> float:
        """The sum of a column that every row has."""
        return _sum(self.options, chosen, column)

    def in_one_format(self, f: str, kept: str | None = None) -> Chosen:
        """Each group with as many ops in `f` as it can have; the others, and `kept`, in base where they may be."""

        def uniform(group: int, c: tuple[str, ...]) -> tuple[bool, bool, int]:
            named = zip(self.members[group], c, strict=True)
            as_kept = all(name == self.base for op, name in named if op == kept)
            return as_kept, set(c) <= {f, self.base}, c.count(f)

        return {
            group: max(options, key=lambda c: uniform(group, c))
            for group, options in self.options.items()
        }

    def times(
        self, chosen: Chosen, gain: float, formats: Mapping[str, str]
    ) -> tuple[float | None, float | None]:
        """The predicted TTFT and, where whole answers are gained, the time per output token (s); None of what was not timed."""
        if self.objective != "et" or self.base_ttft_s is None:
            return None, None
        near, after = neighbours(self.groups, formats, self.base), self.further
        if after is None:
            return self.base_ttft_s - gain - self.interaction * near, None
        first = self.interaction - after.tokens * after.interaction_s
        return (
            self.base_ttft_s - self.sure(chosen, "ttft_gain") - first * near,
            after.base_tpot_s - self.sure(chosen, "tpot_gain") - after.interaction_s * near,
        )

    def plan(
        self,
        strategy: str,
        tau: float,
        budgets: Mapping[str, float],
        chosen: Chosen,
        seed: int = 0,
        solved: Mapping[str, Any] = HEURISTIC,
        scale: Scale = Scale(),
    ) -> tuple[Plan, dict[str, Any]]:
        """The plan that puts each group in its chosen configuration, and its solutions row."""
        formats = {
            op: f
            for group, configuration in chosen.items()
            for op, f in zip(self.members[group], configuration, strict=True)
        }
        gain = self.sure(chosen, "gain")
        ttft, tpot = self.times(chosen, gain, formats)
        costs = {c: (self.total(chosen, c), self.total(chosen, e)) for c, e in ERRORS.items()}
        kl, loss_error, kl_error = costs["kl"][0], *(e and HALF * e for _, e in costs.values())
        doubt = implausible(ttft, self.base_ttft_s, formats.values(), self.base)
        over = missed(self.groups, formats, self.bounds, self.base) if self.bounds else []
        misses = f"Misses {', '.join(over)}." if over else ""
        note = " ".join(part for part in (solved["note"], doubt, misses) if part)
        plan = Plan(
            strategy=strategy,
            objective=self.objective,
            tau=tau,
            base=self.base,
            formats=formats,
            predicted_loss_mse=self.sure(chosen, "loss_mse"),
            budget=budgets.get("loss_mse"),
            predicted_gain=gain,
            mean_square_loss=self.mean_square_loss,
            seed=seed,
            base_ttft_s=self.base_ttft_s,
            predicted_ttft_s=ttft,
            output=self.further.output if self.further else 1,
            base_tpot_s=self.further.base_tpot_s if self.further else None,
            predicted_tpot_s=tpot,
            effective_bits=effective_bits(self.groups, formats, self.base),
            weight_bytes=weight_bytes(self.groups, formats, self.base),
            engine=self.engine,
            predicted_kl=kl,
            predicted_kl_error=kl_error,
            predicted_loss_change=kl,
            predicted_loss_mse_error=loss_error,
            kl_bound=budgets.get("kl"),
            kl_scale=scale.value,
            kl_scale_error=scale.error,
            risk=risk(costs, budgets) if has_tau(strategy) else None,
        )
        of_plan = (
            *(("output", "base_tpot_s", "predicted_tpot_s") if self.further else ()),
            "strategy",
            "objective",
            "tau",
            "seed",
            "predicted_loss_mse",
            "budget",
            "predicted_gain",
            "share_lowered",
            "predicted_ttft_s",
            "base_ttft_s",
            "effective_bits",
            "weight_bytes",
            "predicted_kl",
            "predicted_kl_error",
            "kl_bound",
            "kl_scale",
            "predicted_loss_mse_error",
            "risk",
        )
        return plan, {**{k: getattr(plan, k) for k in of_plan}, **solved, "note": note}


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


def _decisions(options: Rows) -> list[tuple[int, ...]]:
    """The places of a group that take one format in all its configurations: one op, or tied ones."""
    together: dict[tuple[str, ...], list[int]] = {}
    for i, taken in enumerate(zip(*options, strict=True)):
        together.setdefault(taken, []).append(i)
    return [tuple(places) for places in together.values()]


def _options(gains: pl.DataFrame) -> dict[int, Rows]:
    """Each group's rows of the gains table, by configuration."""
    options: dict[int, Rows] = {}
    for row in gains.iter_rows(named=True):
        options.setdefault(row["group"], {})[tuple(row["configuration"])] = row
    return options


def _sum(options: Mapping[int, Rows], chosen: Chosen, column: str) -> float:
    return math.fsum(options[g][c][column] for g, c in chosen.items())


def _walk(
    strategy: str,
    options: Mapping[int, Rows],
    base: str,
    budgets: Mapping[str, float],
    seed: int,
) -> Chosen:
    # base, or where that is ruled out what costs the least
    chosen = {
        group: min(
            of, key=lambda c: (c.count(base) < len(c), *(of[c][column] for column in budgets))
        )
        for group, of in options.items()
    }
    for column, budget in budgets.items():
        if (least := _sum(options, chosen, column)) > budget:
            name, unit = NAMES[column]
            raise no_plan(budget, least, f"{unit} of {name}")
    places = [(group, of) for group in options for of in _decisions(options[group])]
    if strategy == "random":
        random.Random(seed).shuffle(places)
    for group, of in places:
        candidates = [
            c
            for f in _by_speed(options[group], of[0], base)
            if (c := tuple(f if i in of else g for i, g in enumerate(chosen[group])))
            in options[group]
        ]
        if not candidates:
            continue  # an op that cannot be lowered stands in nobody's way
        others = {g: c for g, c in chosen.items() if g != group}
        left = {column: b - _sum(options, others, column) for column, b in budgets.items()}
        row = options[group]
        fitting = next(
            (c for c in candidates if all(row[c][column] <= b for column, b in left.items())), None
        )
        if fitting is None:
            break
        chosen[group] = fitting
    return chosen


def _by_speed(options: Rows, i: int, base: str) -> list[str]:
    names = {c[i] for c in options} - {base}

    def order(name: str) -> tuple[float, float, int, str]:
        scheme = get_scheme(name)
        return mac_time(name, base), scheme.bits, -scheme.weights.mantissa_bits, name

    return sorted(names, key=order)
