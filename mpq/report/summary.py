"""A run in numbers and sentences: who gains most under each bound, how far predictions are off, which bounds are broken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpq.report.results import (
    OBJECTIVES,
    RATIO_RANGE,
    Tables,
    gain_of,
    milliseconds,
    plan_results,
    results_table,
)


@dataclass(frozen=True)
class Winner:
    """The strategies that gain most under one budget (several when equal), and the best of the others."""

    objective: str
    tau: float
    strategies: tuple[str, ...]
    gain: float
    share: float | None  # of the base model's TTFT, where time is gained
    measured: bool
    second: str
    second_gain: float | None


@dataclass(frozen=True)
class Summary:
    """What the report says in words, and the numbers behind it. Errors are median |predicted / measured − 1|."""

    winners: tuple[Winner, ...] = ()
    best: dict[str, Any] | None = None  # the row of results with the shortest measured TTFT
    loss_error: float | None = None
    ttft_error: float | None = None
    gain_error: float | None = None
    over_bound: tuple[
        dict[str, Any], ...
    ] = ()  # plans whose measured loss MSE is above their budget
    out_of_range: tuple[
        dict[str, Any], ...
    ] = ()  # plans whose measured / predicted loss MSE leaves RATIO_RANGE
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def summarize(tables: Tables) -> Summary:
    """The run in numbers and sentences. What the tables do not hold stays None or empty."""
    rows, plans = (
        list(results_table(tables).iter_rows(named=True)),
        list(plan_results(tables).iter_rows(named=True)),
    )
    winners = tuple(
        w
        for key in dict.fromkeys((r["objective"], r["tau"]) for r in rows)
        if (w := _winner(rows, *key))
    )
    timed = [r for r in rows if r["objective"] == "et" and r["measured_ttft_s"] is not None]
    known = [r for r in plans if r["predicted_loss_mse"] and r["measured_loss_mse"] is not None]
    times = [r for r in plans if r["predicted_ttft_s"] and r["measured_ttft_s"]]
    gains = [(r["predicted_gain"], r["carried_gain_s"]) for r in times]
    over = [
        r
        for r in plans
        if r["measured_loss_mse"] is not None
        and r["budget"] is not None
        and r["measured_loss_mse"] > r["budget"]
    ]
    summary = Summary(
        winners=tuple(
            sorted(
                winners,
                key=lambda w: (
                    list(OBJECTIVES).index(w.objective) if w.objective in OBJECTIVES else 9,
                    w.tau,
                ),
            )
        ),
        best=min(timed, key=lambda r: r["measured_ttft_s"] / r["base_ttft_s"], default=None),
        loss_error=_median_error((r["predicted_loss_mse"], r["measured_loss_mse"]) for r in known),
        ttft_error=_median_error((r["predicted_ttft_s"], r["carried_ttft_s"]) for r in times),
        gain_error=_median_error(gains),
        over_bound=tuple(over),
        out_of_range=tuple(
            r
            for r in known
            if not RATIO_RANGE[0]
            <= r["measured_loss_mse"] / r["predicted_loss_mse"]
            <= RATIO_RANGE[1]
        ),
    )
    _tell(summary, len(known), len(times))
    return summary


def _winner(rows: Sequence[dict[str, Any]], objective: str, tau: float) -> Winner | None:
    here = [(r, *gain_of(r)) for r in rows if (r["objective"], r["tau"]) == (objective, tau)]
    measured = any(m for _, _, m in here)  # a measured gain is not compared with a predicted one
    ranked = sorted(
        ((g, r) for r, g, m in here if g is not None and m == measured), key=lambda pair: -pair[0]
    )
    if not ranked:
        return None
    top, row = ranked[0]
    equal = [r["strategy"] for g, r in ranked if math.isclose(g, top, rel_tol=1e-9)]
    second = ranked[len(equal)] if len(equal) < len(ranked) else None
    base = row["solved_base_ttft_s"] or row["base_ttft_s"]
    share = top / base if objective == "et" and base else None
    return Winner(
        objective,
        tau,
        tuple(equal),
        top,
        share,
        measured,
        second[1]["strategy"] if second else "",
        second[0] if second else None,
    )


def _median_error(pairs: Iterable[tuple[float, float]]) -> float | None:
    errors = sorted(abs(p / m - 1) for p, m in pairs if m)
    middle = len(errors) // 2
    return (
        None
        if not errors
        else errors[middle]
        if len(errors) % 2
        else (errors[middle - 1] + errors[middle]) / 2
    )


def _tell(summary: Summary, n_losses: int, n_times: int) -> None:
    say, warn = summary.sentences.append, summary.warnings.append
    for objective in dict.fromkeys(w.objective for w in summary.winners):
        of = [w for w in summary.winners if w.objective == objective]
        how = "Measured" if any(w.measured for w in of) else "Computed"
        name = OBJECTIVES[objective].name if objective in OBJECTIVES else objective
        parts = []
        for who in dict.fromkeys(w.strategies for w in of if w.gain > 0):
            at = [f"{w.tau:g}" for w in of if w.strategies == who and w.gain > 0]
            when = (
                "at every budget"
                if len(at) == len(of)
                else f"at {len(at)} of {len(of)} budgets (τ = {', '.join(at)})"
            )
            parts.append(
                f"{who[0]} gains the most {when}"
                if len(who) == 1
                else f"{', '.join(who)} gain the same {when}"
            )
        none = [f"{w.tau:g}" for w in of if w.gain <= 0]
        parts += [f"nothing gains at τ = {', '.join(none)}"] if none else []
        say(f"{how} {name}: {'; '.join(parts)}.")
    if (best := summary.best) is not None:
        change = 1 - best["measured_ttft_s"] / best["base_ttft_s"]
        say(
            f"The fastest plan, {best['strategy']} at τ = {best['tau']:g}, takes {milliseconds(best['measured_ttft_s'])} ms to the first token "
            f"against {milliseconds(best['base_ttft_s'])} ms of the base model: {abs(change):.1%} {'less' if change >= 0 else 'more'}."
        )
    if summary.loss_error is not None:
        say(
            f"Predicted loss MSE is off by {summary.loss_error:.0%} of the measured one (median of {n_losses} plans)."
        )
    if summary.ttft_error is not None:
        say(
            f"Predicted TTFT is off by {summary.ttft_error:.1%} of the measured one at one speed of the machine (median of {n_times} plans)"
            + (
                f", the time gained by {summary.gain_error:.0%}."
                if summary.gain_error is not None
                else "."
            )
        )
    if summary.over_bound:
        worst = max(
            summary.over_bound, key=lambda r: r["measured_loss_mse"] / (r["budget"] or 1e-300)
        )
        warn(
            f"{_plans(summary.over_bound)} a measured loss MSE above the bound τ²·E[g²]; the farthest is {_name(worst)} "
            f"at {worst['measured_loss_mse'] / (worst['budget'] or 1e-300):.2f} times its bound."
        )
    elif n_losses:
        say("No plan exceeds its bound on the loss MSE when measured.")
    if summary.out_of_range:
        ratios = [
            f"{_name(r)} ({r['measured_loss_mse'] / r['predicted_loss_mse']:.2f})"
            for r in summary.out_of_range
        ]
        listed = ", ".join(ratios[:6]) + (f" and {len(ratios) - 6} more" if len(ratios) > 6 else "")
        warn(
            f"{_plans(summary.out_of_range)} a measured loss MSE outside {RATIO_RANGE[0]:g} to {RATIO_RANGE[1]:g} times "
            f"the predicted one: {listed}. Do not rely on the predictions there."
        )


def _plans(rows: Sequence[object]) -> str:
    return f"{len(rows)} plans have" if len(rows) != 1 else "One plan has"


def _name(row: Mapping[str, Any]) -> str:
    draw = (
        f" draw {row['plan_seed']}"
        if row["strategy"] == "random" and row.get("plan_seed") is not None
        else ""
    )
    objective = "" if row["strategy"].startswith("ip_") else f" ({row['objective']})"
    return f"{row['strategy']}{objective}{draw} at τ = {row['tau']:g}"
