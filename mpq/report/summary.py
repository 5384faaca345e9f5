"""A run in numbers and sentences: who is ahead under each bound, how far predictions are off,
which bounds are broken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from mpq.program.plan import has_tau, is_uniform
from mpq.report.best import Best, best_plan, in_words, outline, percent, shares_of_bounds
from mpq.report.findings import bounds_loss
from mpq.report.results import (
    OBJECTIVES,
    RATIO_RANGE,
    Gain,
    Tables,
    bound_of,
    gain_of,
    milliseconds,
    plan_results,
    results_table,
    sentence,
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Standing:
    """An objective's own strategy at one τ, beside the baselines that keep to the same bound.

    A baseline is told apart where the 95 % intervals of both gains don't overlap; of a time that
    was measured without an interval nothing can be told.
    """

    objective: str
    tau: float
    bound: str  # in words: τ = 0.002, or KL ≤ 0.005
    own: str
    gain: Gain
    share: float | None  # of the base model's time, where time is gained
    ahead: tuple[str, ...]  # of these it gains surely more
    level: tuple[str, ...]  # from these it is not told apart
    behind: tuple[str, ...]  # these gain surely more
    others: tuple[tuple[str, Gain], ...]  # every baseline's gain


@dataclass(frozen=True)
class Summary:
    """What the report says in words, and the numbers behind it.

    Errors are median |predicted / measured − 1|. `over_bound` are plans whose measured loss MSE or
    KL is above its bound, `out_of_range` those whose measured / predicted loss MSE leaves RATIO_RANGE,
    where τ bounds some plan.
    """

    best: Best | None = None
    standings: tuple[Standing, ...] = ()
    loss_error: float | None = None
    kl_error: float | None = None
    ttft_error: float | None = None
    gain_error: float | None = None
    over_bound: tuple[Row, ...] = ()
    out_of_range: tuple[Row, ...] = ()
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def summarize(tables: Tables) -> Summary:
    """The run in numbers and sentences. What the tables do not hold stays None or empty."""
    rows = list(results_table(tables).iter_rows(named=True))
    plans = list(plan_results(tables).iter_rows(named=True))
    keys = dict.fromkeys((r["objective"], r["tau"]) for r in rows)
    known = [r for r in plans if r["predicted_loss_mse"] and r["measured_loss_mse"] is not None]
    kls = [r for r in plans if r["predicted_kl"] and r["measured_kl"] is not None]
    by_loss = bounds_loss(plan_results(tables))
    times = [r for r in plans if r["predicted_ttft_s"] and r["measured_ttft_s"]]
    summary = Summary(
        best=best_plan(tables),
        standings=tuple(s for key in sorted(keys, key=_place) if (s := _standing(rows, *key))),
        loss_error=_median_error((r["predicted_loss_mse"], r["measured_loss_mse"]) for r in known),
        kl_error=_median_error((r["predicted_kl"], r["measured_kl"]) for r in kls),
        ttft_error=_median_error((r["predicted_ttft_s"], r["carried_ttft_s"]) for r in times),
        gain_error=_median_error((r["predicted_gain"], r["carried_gain_s"]) for r in times),
        over_bound=tuple(r for r in plans if _over(r)),
        out_of_range=tuple(
            r for r in known if by_loss and not RATIO_RANGE[0] <= _ratio(r) <= RATIO_RANGE[1]
        ),
    )
    if rows:
        summary.sentences.append(in_words(summary.best))
    _say_standings(summary)
    _say_uniform(summary, rows)
    _say_errors(summary, len(known), len(times))
    _say_bounds(summary, any(has_tau(r["strategy"]) and shares_of_bounds(r) for r in plans))
    return summary


_BOUNDS = {
    "budget": "loss MSE above the bound τ²·E[g²]",
    "kl_bound": "KL divergence above its bound",
}


def _place(key: tuple[str, float]) -> tuple[int, float]:
    objective, tau = key
    return (list(OBJECTIVES).index(objective) if objective in OBJECTIVES else 9), tau


def _ratio(row: Row) -> float:
    return float(row["measured_loss_mse"] / row["predicted_loss_mse"])


def _over(row: Row) -> bool:
    """Whether a plan that was given a bound exceeds it when measured."""
    return has_tau(row["strategy"]) and _farthest(row) > 1


def _farthest(row: Row) -> float:
    """The largest share of a plan's bound that was measured."""
    return max(shares_of_bounds(row).values(), default=0.0)


def _standing(rows: Sequence[Row], objective: str, tau: float) -> Standing | None:
    here = [r for r in rows if (r["objective"], r["tau"]) == (objective, tau)]
    gains = {r["strategy"]: g for r in here if (g := gain_of(r)) and not is_uniform(r["strategy"])}
    if any(g.measured for g in gains.values()):  # which are not compared with predicted ones
        gains = {s: g for s, g in gains.items() if g.measured}
    own = f"ip_{objective}"
    if own not in gains:
        return None
    mine = gains.pop(own)
    row = next(r for r in here if r["strategy"] == own)
    base = row["solved_base_time_s"] or row["base_time_s"]
    return Standing(
        objective,
        tau,
        bound_of(row),
        own,
        mine,
        mine.value / base if objective == "et" and base else None,
        ahead=tuple(s for s, g in gains.items() if mine.above(g)),
        level=tuple(s for s, g in gains.items() if not mine.above(g) and not g.above(mine)),
        behind=tuple(s for s, g in gains.items() if g.above(mine)),
        others=tuple(gains.items()),
    )


def _median_error(pairs: Iterable[tuple[float, float]]) -> float | None:
    errors = [abs(p / m - 1) for p, m in pairs if p is not None and m]
    return median(errors) if errors else None


def _say_standings(summary: Summary) -> None:
    for objective in dict.fromkeys(s.objective for s in summary.standings):
        of = [s for s in summary.standings if s.objective == objective]
        how = "measured" if any(s.gain.measured for s in of) else "computed"
        name = OBJECTIVES[objective].saved if objective in OBJECTIVES else objective
        places: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # baselines that fare alike
        for other in dict.fromkeys(o for s in of for o, _ in s.others):
            for words, bounds in (
                ("ahead of", tuple(s.bound for s in of if other in s.ahead)),
                ("not told apart from", tuple(s.bound for s in of if other in s.level)),
                ("behind", tuple(s.bound for s in of if other in s.behind)),
            ):
                if bounds:
                    places.setdefault((words, bounds), []).append(other)
        parts = [
            f"{words} {_listed(others)} {_at(bounds, len(of))}"
            for (words, bounds), others in places.items()
        ]
        nothing = [s.bound for s in of if s.gain.value <= 0]
        if nothing:
            parts.append(f"gaining nothing {_at(nothing, len(of))}")
        if parts:
            summary.sentences.append(f"{sentence(name)}, {how}: {of[0].own} is {_listed(parts)}.")


def _at(bounds: Sequence[str], every: int) -> str:
    name = bounds[0].split()[0]  # τ, or KL
    if len(bounds) == every:
        return f"at every {'τ' if name == 'τ' else 'bound'}"
    first, *others = bounds
    return f"at {', '.join([first, *(b.split()[-1] for b in others)])}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _say_uniform(summary: Summary, rows: Sequence[Row]) -> None:
    """Everything in one format, of the first objective that has it."""
    uniform = [r for r in rows if is_uniform(r["strategy"])]
    parts = []
    for row in (r for r in uniform if r["objective"] == uniform[0]["objective"]):
        of, words = outline(row), []
        if of.ttft_s is not None and of.base_ttft_s is not None:
            words.append(f"{milliseconds(of.ttft_s)} ms of {milliseconds(of.base_ttft_s)}")
        if of.tpot_s is not None and of.base_tpot_s is not None:
            tokens = f"{milliseconds(of.tpot_s)} of {milliseconds(of.base_tpot_s)}"
            words.append(f"each further token {tokens}")
        if of.perplexity_change is not None:
            words.append(f"perplexity {percent(of.perplexity_change)}")
        if words:
            parts.append(f"{of.strategy} {', '.join(words)}")
    if parts:
        summary.sentences.append(f"Everything in one format: {'; '.join(parts)}.")


def _say_errors(summary: Summary, n_losses: int, n_times: int) -> None:
    say = summary.sentences.append
    if summary.loss_error is not None:
        say(
            f"Predicted loss MSE is off by {summary.loss_error:.0%} of the measured one "
            f"(median of {n_losses} plans)."
        )
    if summary.kl_error is not None:
        say(f"Predicted KL is off by {summary.kl_error:.0%} of the measured one (median).")
    if summary.ttft_error is not None:
        gain = summary.gain_error
        say(
            f"Predicted time to first token is off by {summary.ttft_error:.1%} of the measured one "
            f"(median of {n_times} plans, scaled to one speed of the machine by base's own time)"
            + ("." if gain is None else f", the time saved by {gain:.0%}.")
        )


def _say_bounds(summary: Summary, held: bool) -> None:
    """On broken bounds; `held` says whether what was measured could be held against any."""
    over, out = summary.over_bound, summary.out_of_range
    if over:
        worst = max(over, key=_farthest)
        kinds = {kind for r in over for kind, share in shares_of_bounds(r).items() if share > 1}
        what = " or ".join(words for kind, words in _BOUNDS.items() if kind in kinds)
        summary.warnings.append(
            f"{_plans(over)} a measured {what}; the farthest is "
            f"{_name(worst)} at {_farthest(worst):.2f} times its bound."
        )
    elif held:
        summary.sentences.append("No plan exceeds its bound when measured.")
    if out:
        listed = ", ".join(f"{_name(r)} ({_ratio(r):.2f})" for r in out[:6])
        more = f" and {len(out) - 6} more" if len(out) > 6 else ""
        summary.warnings.append(
            f"{_plans(out)} a measured loss MSE outside {RATIO_RANGE[0]:g} to {RATIO_RANGE[1]:g} "
            f"times the predicted one: {listed}{more}. Do not rely on the predictions there."
        )


def _plans(rows: Sequence[object]) -> str:
    return f"{len(rows)} plans have" if len(rows) != 1 else "One plan has"


def _name(row: Row) -> str:
    draw = ""
    if row["strategy"] == "random" and row.get("plan_seed") is not None:
        draw = f" draw {row['plan_seed']}"
    objective = "" if row["strategy"].startswith("ip_") else f" ({row['objective']})"
    under = f" at {bound_of(row)}" if has_tau(row["strategy"]) else ""
    return f"{row['strategy']}{objective}{draw}{under}"
