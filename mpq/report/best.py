"""Which plan to run, chosen by what was measured, and what people ask of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from mpq.program.plan import LEAST_LOSS, has_tau, is_uniform, plan_name
from mpq.report.results import (
    OBJECTIVES,
    Gain,
    Tables,
    gain_of,
    milliseconds,
    plan_results,
    plus_minus,
    table_of,
)

Row = Mapping[str, Any]
NONE: Mapping[str, float] = {}
_BOUNDED = {"budget": "measured_loss_mse", "kl_bound": "measured_kl"}  # bound, what it bounds


@dataclass(frozen=True)
class Outline:
    """What people ask of a plan: how fast, how large, how much worse. None where not measured.

    Times in seconds as they were measured: `ttft_s`, to the first token; `tpot_s`, to each further
    one of answers of `output` tokens; `base_time_s`, base's for the whole answer; `gain_s`, saved,
    with half its 95 % interval. `weight_bytes` are those of the linears, `cache_bytes` those of keys
    and values where that was decided; `perplexity_change` is relative to base's; `kl` (nats per
    token) is measured, or else predicted; `within` says whether what was measured stays in the
    plan's bounds.
    """

    plan: str  # the name of its file, without .json
    objective: str
    strategy: str
    tau: float
    ttft_s: float | None
    base_ttft_s: float | None
    gain_s: float | None
    gain_half_s: float | None
    weight_bytes: float | None
    base_weight_bytes: float | None
    perplexity: float | None
    perplexity_change: float | None
    kl: float | None
    within: bool | None
    output: int | None = None
    tpot_s: float | None = None
    base_tpot_s: float | None = None
    base_time_s: float | None = None
    cache_bytes: float | None = None
    base_cache_bytes: float | None = None


@dataclass(frozen=True)
class Best:
    """The plan to run, and what is to be said of the choice (`reservation`, empty where nothing).

    `gains` says whether it gains anything at all; where it does not, base is what to run.
    """

    outline: Outline
    gain: Gain
    gains: bool
    reservation: str


def best_plan(tables: Tables) -> Best | None:
    """The plan that gains most of those whose measured loss stays within their bound.

    Of the first objective that the run has: time, else MAC time, else memory. Plans of the integer
    program come first: another is taken only where its gain is surely larger, by intervals that
    don't overlap. A uniform plan has no bound of its own, and is held to the largest of the run.
    Where no plan stays within its bound, the nearest to it is given, and the reservation says so;
    likewise where nothing was measured. The plan of a target is what was asked for, and comes
    before all others. None where no plan lowers anything.
    """
    rows = [r for r in plan_results(tables).iter_rows(named=True) if r["share_lowered"]]
    objective = next((o for o in OBJECTIVES if any(r["objective"] == o for r in rows)), None)
    of = [r for r in rows if r["objective"] == objective and gain_of(r) is not None]
    if not of:
        return None
    evaluated = [r for r in of if _is_measured(r)]
    loosest = _loosest(tables, str(objective))
    within = [r for r in evaluated if _within(r, loosest)]
    reservation, asked = "", [r for r in of if r["strategy"] == LEAST_LOSS]
    if asked:
        chosen: Row = asked[0]
        if not _is_measured(chosen):
            reservation = "It was not evaluated: its loss is known by prediction alone."
    elif not evaluated:
        reservation = "No plan was evaluated: the bound on the loss holds by prediction alone."
        chosen = _most(of)
    elif within:
        chosen = _most(within)
    else:
        chosen = min(evaluated, key=lambda r: _share_of_bound(r, loosest))
        reservation = (
            "No plan's measured loss stays within its bound; this one comes nearest, at "
            f"{_share_of_bound(chosen, loosest):.2f} times its bound."
        )
    gain = gain_of(chosen)
    assert gain is not None
    gains = gain.value > 0
    if gains and gain.measured and gain.low is not None and gain.low <= 0:
        reservation += " What it gains is not told apart from nothing."
    return Best(outline(chosen, loosest), gain, gains, reservation.strip())


def uniform_outlines(tables: Tables, objective: str) -> list[Outline]:
    """Everything in one format, as outlines: those of an objective, then what others add."""
    found: dict[str, Outline] = {}
    loosest, rows = _loosest(tables, objective), plan_results(tables)
    for of in (objective, *OBJECTIVES):
        for row in rows.iter_rows(named=True):
            if row["objective"] == of and is_uniform(row["strategy"]):
                found.setdefault(row["strategy"], outline(row, loosest))
    return list(found.values())


def outline(row: Row, loosest: Mapping[str, float] = NONE) -> Outline:
    """A row of `plan_results` or `results_table` as an outline; `loosest` bounds a uniform plan."""
    kl = row["kl_bound"] if row["budget"] is None else None
    seed = row.get("plan_seed") or 0
    low, high = row["measured_gain_low_s"], row["measured_gain_high_s"]
    measured, beside = row["measured_ttft_s"], row["base_ttft_s"]
    times = row["measured_time_s"], row["base_time_s"]
    difference = None if None in times else times[1] - times[0]
    gain = row["measured_gain_s"]
    known = row["perplexity"] is not None and row["base_perplexity"]
    return Outline(
        plan=plan_name(row["objective"], row["strategy"], row["tau"], seed, kl),
        objective=row["objective"],
        strategy=row["strategy"],
        tau=row["tau"],
        ttft_s=measured,
        base_ttft_s=None if measured is None else beside,
        gain_s=difference if gain is None else gain,
        gain_half_s=None if low is None or high is None else (high - low) / 2,
        weight_bytes=row["weight_bytes"],
        base_weight_bytes=row["base_weight_bytes"],
        perplexity=row["perplexity"],
        perplexity_change=row["perplexity"] / row["base_perplexity"] - 1 if known else None,
        kl=row["predicted_kl"] if row["measured_kl"] is None else row["measured_kl"],
        within=_within(row, loosest) if _is_measured(row) else None,
        output=row["output"],
        tpot_s=row["measured_tpot_s"],
        base_tpot_s=None if measured is None else row["base_tpot_s"],
        base_time_s=None if measured is None else row["base_time_s"],
        cache_bytes=row["cache_bytes"],
        base_cache_bytes=row["base_cache_bytes"],
    )


def in_words(best: Best | None) -> str:
    """What to run, in one line for people."""
    if best is None:
        return "Stay with base: no plan lowers anything within its bound."
    if not best.gains:
        return f"Stay with base: {best.outline.plan}, the best within its bound, gains nothing."
    words = [f"Run {best.outline.plan}: {'; '.join(_parts(best))}."]
    return " ".join([*words, best.reservation]).strip()


def _parts(best: Best) -> list[str]:
    of, parts = best.outline, []
    if of.ttft_s is not None:
        after = "" if of.tpot_s is None else f", {milliseconds(of.tpot_s)} to each after it"
        parts.append(f"{milliseconds(of.ttft_s)} ms to the first token{after}, {saved(of)}")
    elif of.objective == "et":
        parts.append(f"{milliseconds(best.gain.value)} ms saved by prediction, not measured")
    elif of.objective == "tt":
        parts.append(f"{best.gain.value * 1e-9:.4g} billion BF16 MACs saved, not timed")
    if of.weight_bytes is not None and of.base_weight_bytes:
        parts.append(
            f"{of.weight_bytes * 1e-6:.4g} MB of weights instead of "
            f"{of.base_weight_bytes * 1e-6:.4g}"
        )
    if of.cache_bytes is not None and of.base_cache_bytes:
        parts.append(
            f"{of.cache_bytes * 1e-6:.4g} MB of KV cache instead of {of.base_cache_bytes * 1e-6:.4g}"
        )
    if of.perplexity_change is not None:
        parts.append(f"perplexity {percent(of.perplexity_change)}")
    if of.kl is not None:
        parts.append(divergence(of.kl))
    return parts


def saved(of: Outline) -> str:
    """`8.1 ± 0.9 ms less than base's 46`, of a plan that was timed; `… base's 460 for 128 tokens`."""
    gain, half = of.gain_s or 0.0, of.gain_half_s
    by = plus_minus(abs(gain) * 1e3, None if half is None else half * 1e3)
    than = "less" if gain >= 0 else "more"
    whole = "" if of.tpot_s is None else f" for {of.output} tokens"
    return f"{by} ms {than} than base's {milliseconds(of.base_time_s)}{whole}"


def divergence(kl: float) -> str:
    """A KL divergence (nats per token), and the rise of perplexity that it is as much as."""
    return f"KL {kl:.2g} nats a token, as much as perplexity {percent(math.expm1(kl))}"


def percent(change: float) -> str:
    """A relative change with its sign: `+0.12 %`, `−0.03 %`."""
    return f"{change:+.2%}".replace("-", "−").replace("%", " %")


def _most(rows: Sequence[Row]) -> Row:
    """The row that gains most; one of the integer program, unless another surely gains more."""
    timed = [r for r in rows if (g := gain_of(r)) and g.measured]
    rows = timed or rows  # a measured gain is not compared with a predicted one

    def value(row: Row) -> float:
        gain = gain_of(row)
        assert gain is not None
        return gain.value

    own = [r for r in rows if r["strategy"].startswith("ip_")]
    top = max(rows, key=value)
    if not own:
        return top
    mine = max(own, key=value)
    theirs, ours = gain_of(top), gain_of(mine)
    return top if theirs and ours and theirs.above(ours) else mine


def _loosest(tables: Tables, objective: str) -> dict[str, float]:
    """The largest bounds that were asked for under an objective, by column of the solutions."""
    own = table_of(tables, "solutions").filter(objective=objective)
    asked = own.filter(pl.Series([has_tau(s) for s in own["strategy"]], dtype=pl.Boolean))
    largest = {column: asked[column].max() for column in _BOUNDED}
    return {column: float(v) for column, v in largest.items() if v is not None}  # type: ignore[arg-type]


def shares_of_bounds(row: Row, loosest: Mapping[str, float] = NONE) -> dict[str, float]:
    """What was measured over each of the plan's bounds, by the bound's column."""
    held = loosest if not has_tau(row["strategy"]) and loosest else row
    found = {}
    for bound, measured in _BOUNDED.items():
        if held.get(bound) is not None and row[measured] is not None:
            found[bound] = float(row[measured] / (held[bound] or 1e-300))
    return found


def _is_measured(row: Row) -> bool:
    return any(row[measured] is not None for measured in _BOUNDED.values())


def _within(row: Row, loosest: Mapping[str, float]) -> bool:
    return _share_of_bound(row, loosest) <= 1


def _share_of_bound(row: Row, loosest: Mapping[str, float]) -> float:
    """The largest share of a bound that was measured; infinite where none was."""
    return max(shares_of_bounds(row, loosest).values(), default=math.inf)
