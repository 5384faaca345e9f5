"""One objective's options, and how a choice among them becomes a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Required, TypeAlias, TypedDict

import numpy as np
import polars as pl

from mpq.program.anchors import Scale
from mpq.program.bounds import bound_rows, missed
from mpq.program.certainty import ERRORS, HALF, risk
from mpq.program.costs import summed
from mpq.program.memory import effective_bits, weight_bytes
from mpq.program.plan import Plan, has_tau
from mpq.program.rows import Row
from mpq.program.signed import SignedLoss
from mpq.timing.answer import Further
from mpq.timing.design import members, neighbours
from mpq.timing.plausible import TPOT, implausible

if TYPE_CHECKING:
    from mpq.spec import BoundsSpec, EngineName

# configuration → its row of the gains table
Rows: TypeAlias = dict[tuple[str, ...], Mapping[str, Any]]
Chosen: TypeAlias = dict[int, tuple[str, ...]]  # group → its configuration
HEURISTIC = {"bound": None, "status": "heuristic", "solver": "none", "seconds": 0.0, "note": ""}


class Facts(TypedDict, total=False):
    """What a program rests on besides its tables.

    The mean square loss (nats²) and the base format; base's TTFT (s); `interaction` (s), which corrects the predicted TTFT for
    lowered neighbours (design.interaction); where whole answers were timed, `further` of the tokens after the first; the
    bounds on whole plans and the engine; `signed`, by which the loss MSE is that with rounding's signs (signed.py).
    """

    mean_square_loss: Required[float]
    base: Required[str]
    base_ttft_s: float | None
    interaction: float
    further: Further | None
    bounds: BoundsSpec | None
    engine: EngineName
    signed: SignedLoss | None


@dataclass(frozen=True)
class Program:
    """One objective's options, and how a choice among them becomes a plan. What it rests on: Facts."""

    objective: str
    groups: pl.DataFrame
    gains: pl.DataFrame
    mean_square_loss: float
    base: str
    base_ttft_s: float | None = None
    interaction: float = 0.0
    further: Further | None = None
    bounds: BoundsSpec | None = None
    engine: EngineName = "none"
    signed: SignedLoss | None = None

    @cached_property
    def members(self) -> dict[int, list[str]]:
        """Each group's ops."""
        return members(self.groups, self.gains)

    @cached_property
    def options(self) -> dict[int, Rows]:
        """Each group's rows of the gains table, by configuration."""
        return options_of(self.gains)

    @property
    def bound_rows(self) -> list[Row]:
        """The bounds on whole plans, over the rows of the gains table."""
        return bound_rows(self.gains, self.groups, self.bounds, self.base) if self.bounds else []

    def tau_of(self, budgets: Mapping[str, float]) -> float:
        """τ of a budget of the loss MSE; of KL alone what the loss moves by, if it moves by as much."""
        if "loss_mse" in budgets:
            return math.sqrt(max(0.0, budgets["loss_mse"]) / self.mean_square_loss)
        return budgets["kl"] / math.sqrt(self.mean_square_loss)

    def total(self, chosen: Chosen, column: str) -> float | None:
        """The sum of a column over the chosen configurations; None where one of them has none."""
        return summed([self.options[g][c].get(column) for g, c in chosen.items()])

    def sure(self, chosen: Chosen, column: str) -> float:
        """The sum of a column that every row has."""
        return total_of(self.options, chosen, column)

    def choices(self, chosen: Chosen) -> list[dict[str, str]]:
        """Of each group its ops' formats."""
        return [dict(zip(self.members[g], c, strict=True)) for g, c in chosen.items()]

    def loss(self, chosen: Chosen) -> float:
        """The predicted loss MSE (nats²): the sum of the column, or that with signs where that is bounded."""
        return self._loss(chosen)[0]

    def _loss(self, chosen: Chosen) -> tuple[float, float | None]:
        """With its standard error."""
        if self.signed is None:
            return self.sure(chosen, "loss_mse"), self.total(chosen, ERRORS["loss_mse"])
        terms, rows = self.signed.terms(self.choices(chosen)), np.arange(len(chosen))
        return terms.mse(rows), terms.error(rows)

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
        costs: dict[str, tuple[float | None, float | None]] = {
            c: (self.total(chosen, c), self.total(chosen, e)) for c, e in ERRORS.items()
        }
        loss, loss_error = costs["loss_mse"] = self._loss(chosen)
        kl, kl_error = costs["kl"]
        doubt = implausible(ttft, self.base_ttft_s, formats.values(), self.base)
        base_tpot = self.further.base_tpot_s if self.further else None
        slow = implausible(tpot, base_tpot, formats.values(), self.base, TPOT)
        over = missed(self.groups, formats, self.bounds, self.base) if self.bounds else []
        misses = f"Misses {', '.join(over)}." if over else ""
        note = " ".join(part for part in (solved["note"], doubt, slow, misses) if part)
        plan = Plan(
            strategy=strategy,
            objective=self.objective,
            tau=tau,
            base=self.base,
            formats=formats,
            predicted_loss_mse=loss,
            signed=self.signed is not None,
            budget=budgets.get("loss_mse"),
            predicted_gain=gain,
            mean_square_loss=self.mean_square_loss,
            seed=seed,
            base_ttft_s=self.base_ttft_s,
            predicted_ttft_s=ttft,
            output=self.further.output if self.further else 1,
            base_tpot_s=base_tpot,
            predicted_tpot_s=tpot,
            effective_bits=effective_bits(self.groups, formats, self.base),
            weight_bytes=weight_bytes(self.groups, formats, self.base),
            cache_bytes=self.total(chosen, "cache_bytes"),
            base_cache_bytes=self.total(chosen, "base_cache_bytes"),
            engine=self.engine,
            predicted_kl=kl,
            predicted_kl_error=None if kl_error is None else HALF * kl_error,
            predicted_loss_change=kl,
            predicted_loss_mse_error=None if loss_error is None else HALF * loss_error,
            kl_bound=budgets.get("kl"),
            kl_scale=scale.value,
            kl_scale_error=scale.error,
            risk=risk(costs, budgets) if has_tau(strategy) else None,
        )
        of_plan = (
            *(("output", "base_tpot_s", "predicted_tpot_s") if self.further else ()),
            *(("cache_bytes", "base_cache_bytes") if plan.cache_bytes is not None else ()),
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


def chosen_of(rows: pl.DataFrame) -> Chosen:
    """The configurations of rows of a gains table, one of each group."""
    return {g: tuple(c) for g, c in rows.select("group", "configuration").iter_rows()}


def options_of(gains: pl.DataFrame) -> dict[int, Rows]:
    """Each group's rows of the gains table, by configuration."""
    options: dict[int, Rows] = {}
    for row in gains.iter_rows(named=True):
        options.setdefault(row["group"], {})[tuple(row["configuration"])] = row
    return options


def total_of(options: Mapping[int, Rows], chosen: Chosen, column: str) -> float:
    """The sum of a column, which every row has, over the chosen configurations."""
    return math.fsum(options[g][c][column] for g, c in chosen.items())
