"""A run told to people: the results table, a summary computed from the numbers, and one HTML file that needs nothing else.

Everything here is read off the tables, so a report can be written again from any finished run. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined

from mpq.drift import carried
from mpq.formats import FORMATS
from mpq.tables import SCHEMAS, validate

Tables = Mapping[str, pl.DataFrame]

REPORTED = ("groups", "timing", "solutions", "plans", "evaluation", "sensitivity", "loss")
STRATEGIES = ("ip_et", "ip_tt", "ip_m", "random", "prefix")
RATIO_RANGE = (0.5, 2.0)  # measured / predicted loss MSE outside of it is worth a warning
TOP_OPS = 40
_KEYS = ["objective", "strategy", "tau"]
_NUMBERS = (
    "predicted_loss_mse", "measured_loss_mse", "predicted_ttft_s", "measured_ttft_s", "base_ttft_s", "perplexity",
    "base_perplexity", "share_lowered",
)  # fmt: skip
_FURTHER = ("measured_loss_mse_std", "measured_ttft_s_std", "perplexity_std", "budget", "predicted_gain", "solved_base_ttft_s")


class Objective(NamedTuple):
    """What an objective gains: its name, and how a gain in the tables' unit is shown (`scale` × gain, in `unit`)."""

    name: str
    saved: str
    unit: str
    scale: float


OBJECTIVES = {
    "et": Objective("time to first token", "time saved", "ms", 1e3),
    "tt": Objective("MAC time", "MAC time saved", "billion BF16 MACs", 1e-9),
    "m": Objective("weight memory", "memory saved", "MB", 1e-6),
}


def table_of(tables: Tables, name: str) -> pl.DataFrame:
    """The table called `name`, or an empty one where the run has none. Raises MpqError where columns are missing."""
    frame = tables.get(name)
    return pl.DataFrame(schema=SCHEMAS[name]) if frame is None or frame.is_empty() else validate(name, frame)


def results_table(tables: Tables) -> pl.DataFrame:
    """Predicted beside measured, a row for each objective, strategy and τ: the mean over seeds and over random draws.

    Loss MSE in nats², times in seconds, `share_lowered` 0 to 1, `seeds` the number of measurements behind the loss MSE.
    Behind them: standard deviations over those measurements, the budget, the predicted gain and what the solver said.
    `base_ttft_s` was measured beside the plan, `solved_base_ttft_s` while configurations were timed, at whose speed `carried_ttft_s`
    and `carried_gain_s` are what was measured (drift.py). What was not predicted or not measured is null.
    """
    return _merged(tables, _KEYS).drop("plan_seed", strict=False)


def plan_results(tables: Tables) -> pl.DataFrame:
    """As `results_table`, with a row for each plan: the draws of the random strategy apart, told by `plan_seed`."""
    return _merged(tables, [*_KEYS, "plan_seed"])


def _merged(tables: Tables, keys: list[str]) -> pl.DataFrame:
    solutions = table_of(tables, "solutions").rename({"seed": "plan_seed", "base_ttft_s": "solved_base_ttft_s"})
    numbers = ("predicted_loss_mse", "predicted_ttft_s", "solved_base_ttft_s", "share_lowered", "budget", "predicted_gain")
    words = (pl.col(c).drop_nulls().unique(maintain_order=True).str.join("; ") for c in ("status", "solver", "note"))
    merged = solutions.group_by(keys).agg(*(pl.col(c).mean() for c in numbers), *words)
    loss = table_of(tables, "evaluation").filter(pl.col("task") == "loss")
    for metric, name, base in (
        ("loss_mse", "measured_loss_mse", "mean_square_loss"), ("ttft_s", "measured_ttft_s", "base_ttft_s"),
        ("perplexity", "perplexity", "base_perplexity"),
    ):  # fmt: skip
        value = pl.col("value")
        seeds = [pl.len().cast(pl.Int64).alias("seeds")] if metric == "loss_mse" else []
        measured = loss.filter(pl.col("metric") == metric).group_by(keys).agg(
            value.mean().alias(name), value.std().alias(f"{name}_std"), pl.col("base_value").mean().alias(base), *seeds
        )  # fmt: skip
        merged = merged.join(measured, on=keys, how="full", coalesce=True)
    place = {name: i for i, name in enumerate((*OBJECTIVES, *STRATEGIES))}
    whole = merged.with_columns(
        pl.coalesce("base_ttft_s", "solved_base_ttft_s").alias("base_ttft_s"), pl.col("seeds").fill_null(0)
    ).sort(
        pl.col("objective").replace_strict(place, default=99), pl.col("strategy").replace_strict(place, default=99), *keys
    ).select(*keys, *_NUMBERS, "seeds", *_FURTHER, "status", "solver", "note")  # fmt: skip
    return carried(whole)


def gain_of(row: Mapping[str, Any]) -> tuple[float | None, bool]:
    """What a row of results gains, in the objective's unit of the tables, and whether that was measured."""
    if row["objective"] == "et" and row["carried_gain_s"] is not None:
        return row["carried_gain_s"], True
    return row["predicted_gain"], False


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
    over_bound: tuple[dict[str, Any], ...] = ()  # plans whose measured loss MSE is above their budget
    out_of_range: tuple[dict[str, Any], ...] = ()  # plans whose measured / predicted loss MSE leaves RATIO_RANGE
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def summarize(tables: Tables) -> Summary:
    """The run in numbers and sentences. What the tables do not hold stays None or empty."""
    rows, plans = list(results_table(tables).iter_rows(named=True)), list(plan_results(tables).iter_rows(named=True))
    winners = tuple(w for key in dict.fromkeys((r["objective"], r["tau"]) for r in rows) if (w := _winner(rows, *key)))
    timed = [r for r in rows if r["objective"] == "et" and r["measured_ttft_s"] is not None]
    known = [r for r in plans if r["predicted_loss_mse"] and r["measured_loss_mse"] is not None]
    times = [r for r in plans if r["predicted_ttft_s"] and r["measured_ttft_s"]]
    gains = [(r["predicted_gain"], r["carried_gain_s"]) for r in times]
    over = [
        r
        for r in plans
        if r["measured_loss_mse"] is not None and r["budget"] is not None and r["measured_loss_mse"] > r["budget"]
    ]
    summary = Summary(
        winners=tuple(
            sorted(winners, key=lambda w: (list(OBJECTIVES).index(w.objective) if w.objective in OBJECTIVES else 9, w.tau))
        ),
        best=min(timed, key=lambda r: r["measured_ttft_s"] / r["base_ttft_s"], default=None),
        loss_error=_median_error((r["predicted_loss_mse"], r["measured_loss_mse"]) for r in known),
        ttft_error=_median_error((r["predicted_ttft_s"], r["carried_ttft_s"]) for r in times),
        gain_error=_median_error(gains),
        over_bound=tuple(over),
        out_of_range=tuple(
            r for r in known if not RATIO_RANGE[0] <= r["measured_loss_mse"] / r["predicted_loss_mse"] <= RATIO_RANGE[1]
        ),
    )
    _tell(summary, len(known), len(times))
    return summary


def _winner(rows: Sequence[dict[str, Any]], objective: str, tau: float) -> Winner | None:
    here = [(r, *gain_of(r)) for r in rows if (r["objective"], r["tau"]) == (objective, tau)]
    measured = any(m for _, _, m in here)  # a measured gain is not compared with a predicted one
    ranked = sorted(((g, r) for r, g, m in here if g is not None and m == measured), key=lambda pair: -pair[0])
    if not ranked:
        return None
    top, row = ranked[0]
    equal = [r["strategy"] for g, r in ranked if math.isclose(g, top, rel_tol=1e-9)]
    second = ranked[len(equal)] if len(equal) < len(ranked) else None
    base = row["solved_base_ttft_s"] or row["base_ttft_s"]
    share = top / base if objective == "et" and base else None
    return Winner(
        objective, tau, tuple(equal), top, share, measured, second[1]["strategy"] if second else "", second[0] if second else None
    )


def _median_error(pairs: Iterable[tuple[float, float]]) -> float | None:
    errors = sorted(abs(p / m - 1) for p, m in pairs if m)
    middle = len(errors) // 2
    return None if not errors else errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2


def _tell(summary: Summary, n_losses: int, n_times: int) -> None:
    say, warn = summary.sentences.append, summary.warnings.append
    for objective in dict.fromkeys(w.objective for w in summary.winners):
        of = [w for w in summary.winners if w.objective == objective]
        how = "Measured" if any(w.measured for w in of) else "Computed"
        name = OBJECTIVES[objective].name if objective in OBJECTIVES else objective
        parts = []
        for who in dict.fromkeys(w.strategies for w in of if w.gain > 0):
            at = [f"{w.tau:g}" for w in of if w.strategies == who and w.gain > 0]
            when = "at every budget" if len(at) == len(of) else f"at {len(at)} of {len(of)} budgets (τ = {', '.join(at)})"
            parts.append(f"{who[0]} gains the most {when}" if len(who) == 1 else f"{', '.join(who)} gain the same {when}")
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
        say(f"Predicted loss MSE is off by {summary.loss_error:.0%} of the measured one (median of {n_losses} plans).")
    if summary.ttft_error is not None:
        say(
            f"Predicted TTFT is off by {summary.ttft_error:.1%} of the measured one at one speed of the machine (median of {n_times} plans)"
            + (f", the time gained by {summary.gain_error:.0%}." if summary.gain_error is not None else ".")
        )
    if summary.over_bound:
        worst = max(summary.over_bound, key=lambda r: r["measured_loss_mse"] / (r["budget"] or 1e-300))
        warn(
            f"{_plans(summary.over_bound)} a measured loss MSE above the bound τ²·E[g²]; the farthest is {_name(worst)} "
            f"at {worst['measured_loss_mse'] / (worst['budget'] or 1e-300):.2f} times its bound."
        )
    elif n_losses:
        say("No plan exceeds its bound on the loss MSE when measured.")
    if summary.out_of_range:
        ratios = [f"{_name(r)} ({r['measured_loss_mse'] / r['predicted_loss_mse']:.2f})" for r in summary.out_of_range]
        listed = ", ".join(ratios[:6]) + (f" and {len(ratios) - 6} more" if len(ratios) > 6 else "")
        warn(
            f"{_plans(summary.out_of_range)} a measured loss MSE outside {RATIO_RANGE[0]:g} to {RATIO_RANGE[1]:g} times "
            f"the predicted one: {listed}. Do not rely on the predictions there."
        )


def _plans(rows: Sequence[object]) -> str:
    return f"{len(rows)} plans have" if len(rows) != 1 else "One plan has"


def _name(row: Mapping[str, Any]) -> str:
    draw = f" draw {row['plan_seed']}" if row["strategy"] == "random" and row.get("plan_seed") is not None else ""
    objective = "" if row["strategy"].startswith("ip_") else f" ({row['objective']})"
    return f"{row['strategy']}{objective}{draw} at τ = {row['tau']:g}"


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds in four digits, without the unit."""
    return "–" if seconds is None else f"{seconds * 1e3:.4g}"


def base_of(tables: Tables, facts: Mapping[str, str]) -> str:
    """The base format: what the facts say, or else the widest in the plans."""
    found = table_of(tables, "plans")["format"].unique().to_list()
    return facts.get("base") or max(found, key=lambda f: FORMATS[f].bits if f in FORMATS else 0, default="")


def _write(value: Any, style: str, spread: float | None = None) -> str:
    """A cell's text: the value in its style (sci, ms, share, number, count, or as it is), ± its standard deviation."""
    if value is None or value == "":
        return "–"
    styles: dict[str, Callable[[Any], str]] = {
        "sci": lambda v: f"{v:.3g}" if v == 0 or 1e-3 <= abs(v) < 1e5 else f"{v:.2e}",
        "ms": milliseconds,
        "share": lambda v: f"{v:.1%}",
        "number": lambda v: f"{v:.4g}",
        "points": lambda v: f"{v:.3f}".replace("-", "−"),
        "count": lambda v: f"{v:,}",
        "": str,
    }
    text = styles[style](value)
    return text if spread is None else f"{text} ± {spread * (1e3 if style == 'ms' else 1):.2g}"


def _amount(objective: str, gain: float | None) -> str:
    unit = OBJECTIVES.get(objective, Objective(objective, "gain", "", 1.0))
    return "" if gain is None else f"{gain * unit.scale:.4g} {unit.unit}"


def _rows(tables: Tables, summary: Summary) -> dict[str, list[dict[str, Any]]]:
    """The rows of the page's tables; the template says which columns it shows."""
    ratio = pl.when(pl.col("predicted_loss_mse") > 0).then(pl.col("measured_loss_mse") / pl.col("predicted_loss_mse"))
    error = pl.col("predicted_ttft_s") / pl.col("carried_ttft_s") - 1
    results = results_table(tables).with_columns(ratio=ratio, ttft_error=error).to_dicts()
    groups = table_of(tables, "groups").sort("order").group_by("group", "signature", maintain_order=True)
    timing = table_of(tables, "timing").sort("signature", "gain_s", descending=[False, True])
    return {
        "winners": [
            {
                "objective": OBJECTIVES[w.objective].name if w.objective in OBJECTIVES else w.objective,
                "tau": w.tau,
                "most": " = ".join(w.strategies),
                "gain": _amount(w.objective, w.gain),
                "share": w.share,
                "how": "measured" if w.measured else "computed",
                "next": w.second and f"{w.second}: {_amount(w.objective, w.second_gain)}",
            }
            for w in summary.winners
        ],
        "results": [{**row, "gain": _amount(row["objective"], row["predicted_gain"])} for row in results],
        "groups": groups.agg(pl.col("op").str.join(", "), pl.col("macs").sum(), pl.col("parameters").sum()).to_dicts(),
        "timing": timing.with_columns(pl.col("configuration").list.join(" ")).to_dicts(),
    }


class Sensitivities(NamedTuple):
    """Ops by the loss MSE (nats²) of lowering one alone, a column for each format; the largest first."""

    noise_model: str
    formats: list[str]
    rows: list[dict[str, Any]]
    ops: int


def _sensitivities(tables: Tables, noise_model: str) -> Sensitivities:
    rows = table_of(tables, "sensitivity")
    models = rows["noise_model"].unique().sort().to_list()
    model = noise_model if noise_model in models else next(iter(models), "")
    chosen = rows.filter(pl.col("noise_model") == model)
    by_op = chosen.pivot("format", index="op", values="loss_mse", aggregate_function="sum", sort_columns=True)
    formats = [f for f in by_op.columns if f != "op" and (by_op[f] > 0).any()]
    ranked = by_op.with_columns(top=pl.max_horizontal(formats) if formats else pl.lit(0.0)).sort("top", descending=True)
    shared = ranked.with_columns(share=pl.col("top") / pl.col("top").sum())
    return Sensitivities(model, formats, shared.head(TOP_OPS).to_dicts(), ranked.height)


def write_report(tables: Tables, title: str, facts: Mapping[str, str]) -> str:
    """One self-contained HTML page on a run: it fetches nothing and works from a file, offline.

    `tables` are the run's tables by name (REPORTED), `facts` what is told of the run (model, device, versions).
    A missing or empty table leaves a sentence in its section. Raises MpqError for a table that lacks columns.
    """
    from mpq.findings import find, rows_of
    from mpq.paper_figures import page_figures, page_rows  # matplotlib is slow to load; results_table does not need it

    pages = Environment(
        loader=PackageLoader("mpq"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.globals["write"] = _write
    summary, found, base = summarize(tables), find(tables), base_of(tables, facts)
    summary.sentences.extend(found.sentences)
    summary.warnings.extend(found.warnings)
    figures, left_out = page_figures(tables, base)
    return pages.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        missing=[name for name in REPORTED if table_of(tables, name).is_empty()],
        summary=summary,
        rows={**_rows(tables, summary), **rows_of(found), **page_rows(tables, base)},
        sensitivity=_sensitivities(tables, facts.get("noise model", "")),
        figures=figures,
        left_out=left_out,
    )
