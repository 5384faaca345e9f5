"""A run told to people: the results table, a summary computed from the numbers, and one HTML file that needs nothing else.

Everything here is read off the tables, so a report can be written again from any finished run. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined

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
_FURTHER = ("measured_loss_mse_std", "measured_ttft_s_std", "perplexity_std", "budget", "predicted_gain")


class Objective(NamedTuple):
    """What an objective gains: its name, and how a gain in the tables' unit is shown (`scale` × gain, in `unit`)."""

    name: str
    saved: str
    unit: str
    scale: float


OBJECTIVES = {
    "et": Objective("time to first token", "time saved", "ms", 1e3),
    "tt": Objective("MAC time", "MAC time saved", "10⁹ BF16 MACs", 1e-9),
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
    What was not predicted or not measured is null.
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
    return merged.with_columns(
        pl.coalesce("base_ttft_s", "solved_base_ttft_s").alias("base_ttft_s"), pl.col("seeds").fill_null(0)
    ).sort(
        pl.col("objective").replace_strict(place, default=99), pl.col("strategy").replace_strict(place, default=99), *keys
    ).select(*keys, *_NUMBERS, "seeds", *_FURTHER, "status", "solver", "note")  # fmt: skip


def gain_of(row: Mapping[str, Any]) -> tuple[float | None, bool]:
    """What a row of results gains, in the objective's unit of the tables, and whether that was measured."""
    if row["objective"] == "et" and row["measured_ttft_s"] is not None:
        return row["base_ttft_s"] - row["measured_ttft_s"], True
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
    gains = [(r["predicted_gain"], r["base_ttft_s"] - r["measured_ttft_s"]) for r in times]
    over = [r for r in plans if r["measured_loss_mse"] is not None and r["budget"] is not None and r["measured_loss_mse"] > r["budget"]]
    summary = Summary(
        winners=tuple(sorted(winners, key=lambda w: (list(OBJECTIVES).index(w.objective) if w.objective in OBJECTIVES else 9, w.tau))),
        best=min(timed, key=lambda r: r["measured_ttft_s"] / r["base_ttft_s"], default=None),
        loss_error=_median_error((r["predicted_loss_mse"], r["measured_loss_mse"]) for r in known),
        ttft_error=_median_error((r["predicted_ttft_s"], r["measured_ttft_s"]) for r in times),
        gain_error=_median_error(gains),
        over_bound=tuple(over),
        out_of_range=tuple(r for r in known if not RATIO_RANGE[0] <= r["measured_loss_mse"] / r["predicted_loss_mse"] <= RATIO_RANGE[1]),
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
    share = top / row["base_ttft_s"] if objective == "et" and row["base_ttft_s"] else None
    return Winner(objective, tau, tuple(equal), top, share, measured, second[1]["strategy"] if second else "", second[0] if second else None)


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
        wins = {s: [w for w in of if s in w.strategies and w.gain > 0] for s in dict.fromkeys(s for w in of for s in w.strategies)}
        parts = [
            f"{s} gains {'the most' if all(len(w.strategies) == 1 for w in at) else 'the most or as much as the best'} "
            + ("at every budget" if len(at) == len(of) else f"at {len(at)} of {len(of)} budgets (τ = {', '.join(f'{w.tau:g}' for w in at)})")
            for s, at in wins.items() if at
        ]  # fmt: skip
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
            f"Predicted TTFT is off by {summary.ttft_error:.1%} of the measured one (median of {n_times} plans)"
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
        of = [f"{_name(r)} ({r['measured_loss_mse'] / r['predicted_loss_mse']:.2f})" for r in summary.out_of_range]
        listed = ", ".join(of[:6]) + (f" and {len(of) - 6} more" if len(of) > 6 else "")
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


class Column(NamedTuple):
    """A column of a table in the report: heading, key in the rows, and how its value is written ("" for text)."""

    heading: str
    key: str
    style: str = ""


class HtmlTable(NamedTuple):
    """A table for the template; `rows` hold (text, raw value) for each cell: people read the one, sorting and CSV the other."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: list[list[tuple[str, Any]]]


_STYLES = {
    "sci": lambda v: f"{v:.3g}" if v == 0 or 1e-3 <= abs(v) < 1e5 else f"{v:.2e}",
    "ms": milliseconds,
    "share": lambda v: f"{v:.1%}",
    "number": lambda v: f"{v:.4g}",
    "count": lambda v: f"{v:,}",
    "": str,
}


def _html(name: str, caption: str, columns: Sequence[Column], rows: Iterable[Mapping[str, Any]]) -> HtmlTable:
    def cell(row: Mapping[str, Any], column: Column) -> tuple[str, Any]:
        value = row[column.key]
        text = "–" if value is None or value == "" else _STYLES[column.style](value)
        spread = row.get(f"{column.key}_std")
        return text + (f" ± {_STYLES[column.style](spread)}" if spread is not None and value is not None else ""), "" if value is None else value

    return HtmlTable(name, caption, tuple(columns), [[cell(row, column) for column in columns] for row in rows])


def _results_html(tables: Tables) -> HtmlTable:
    def extended(row: dict[str, Any]) -> dict[str, Any]:
        ratio = row["measured_loss_mse"] / row["predicted_loss_mse"] if row["predicted_loss_mse"] and row["measured_loss_mse"] is not None else None
        unit = OBJECTIVES.get(row["objective"])
        gain = f"{row['predicted_gain'] * unit.scale:.4g} {unit.unit}" if unit and row["predicted_gain"] is not None else ""
        return {**row, "ratio": ratio, "gain": gain}

    columns = [
        Column("Strategy", "strategy"), Column("Objective", "objective"), Column("τ", "tau", "number"),
        Column("Loss MSE predicted (nats²)", "predicted_loss_mse", "sci"), Column("measured (nats²)", "measured_loss_mse", "sci"),
        Column("measured / predicted", "ratio", "number"), Column("bound (nats²)", "budget", "sci"),
        Column("TTFT predicted (ms)", "predicted_ttft_s", "ms"), Column("measured (ms)", "measured_ttft_s", "ms"),
        Column("base (ms)", "base_ttft_s", "ms"), Column("Gain predicted", "gain"), Column("Perplexity", "perplexity", "number"),
        Column("base", "base_perplexity", "number"), Column("Ops lowered", "share_lowered", "share"), Column("Seeds", "seeds", "count"),
        Column("Solver", "solver"), Column("Status", "status"), Column("Note", "note"),
    ]  # fmt: skip
    caption = "Mean over seeds (and over the draws of random) ± standard deviation; – where nothing was predicted or measured."
    return _html("results", caption, columns, map(extended, results_table(tables).iter_rows(named=True)))


def _groups_html(tables: Tables) -> HtmlTable:
    groups = table_of(tables, "groups").sort("order").group_by("group", "signature", maintain_order=True).agg(
        pl.col("op").str.join(", "), pl.col("macs").sum(), pl.col("parameters").sum()
    )  # fmt: skip
    columns = [
        Column("Group", "group", "count"), Column("Ops", "op"), Column("Signature", "signature"), Column("MACs", "macs", "count"),
        Column("Parameters", "parameters", "count"),
    ]  # fmt: skip
    return _html("groups", "Ops decided and timed together; groups of one signature do the same work.", columns, groups.iter_rows(named=True))


def _timing_html(tables: Tables) -> HtmlTable:
    timing = table_of(tables, "timing").sort("signature", "gain_s", descending=[False, True]).with_columns(pl.col("configuration").list.join(" "))
    columns = [
        Column("Signature", "signature"), Column("Configuration, in op order", "configuration"), Column("TTFT (ms)", "ttft_s", "ms"),
        Column("base (ms)", "base_ttft_s", "ms"), Column("Gain of one instance (ms)", "gain_s", "ms"),
        Column("interval from (ms)", "gain_ci_low_s", "ms"), Column("to (ms)", "gain_ci_high_s", "ms"),
        Column("Instances timed", "instances", "count"), Column("Repeats", "repeats", "count"), Column("Batch", "batch", "count"),
        Column("Length", "length", "count"), Column("Device", "device"), Column("Load average", "load_average", "number"),
    ]  # fmt: skip
    return _html("timing", "Each configuration of each group's signature, timed with the rest in base.", columns, timing.iter_rows(named=True))


def _sensitivity_html(tables: Tables, noise_model: str) -> HtmlTable:
    rows = table_of(tables, "sensitivity")
    models = rows["noise_model"].unique().sort().to_list()
    model = noise_model if noise_model in models else next(iter(models), "")
    by_op = rows.filter(pl.col("noise_model") == model).pivot("format", index="op", values="loss_mse", aggregate_function="sum", sort_columns=True)
    formats = [f for f in by_op.columns if f != "op" and (by_op[f] > 0).any()]
    ranked = by_op.with_columns(top=pl.max_horizontal(formats) if formats else pl.lit(0.0)).sort("top", descending=True)
    shared = ranked.with_columns(share=pl.col("top") / pl.col("top").sum()).head(TOP_OPS)
    columns = [Column("Op", "op"), *(Column(f"{f} (nats²)", f, "sci") for f in formats), Column("Share of all ops", "share", "share")]
    caption = (
        f"Loss MSE of one op lowered alone, noise model {model}; the {min(TOP_OPS, ranked.height)} largest of {ranked.height} ops. "
        "The share is that of the coarsest format."
    )
    return _html("sensitivity", caption, columns, shared.iter_rows(named=True))


def _winners_html(summary: Summary) -> HtmlTable:
    def row(w: Winner) -> dict[str, Any]:
        unit = OBJECTIVES.get(w.objective, Objective(w.objective, "gain", "", 1.0))
        second = "" if w.second_gain is None else f"{w.second}: {w.second_gain * unit.scale:.4g} {unit.unit}"
        gain = f"{w.gain * unit.scale:.4g} {unit.unit}"
        kind = "measured" if w.measured else "computed"
        return {"what": unit.name, "tau": w.tau, "who": " = ".join(w.strategies), "gain": gain, "share": w.share, "kind": kind, "second": second}

    columns = [
        Column("Objective", "what"), Column("τ", "tau", "number"), Column("Gains most", "who"), Column("Gain", "gain"),
        Column("of base", "share", "share"), Column("", "kind"), Column("Next", "second"),
    ]  # fmt: skip
    return _html("winners", "The largest gain under each bound.", columns, map(row, summary.winners))


def write_report(tables: Tables, title: str, facts: Mapping[str, str]) -> str:
    """One self-contained HTML page on a run: it fetches nothing and works from a file, offline.

    `tables` are the run's tables by name (REPORTED), `facts` what is told of the run (model, device, versions).
    A missing or empty table leaves a sentence in its section. Raises MpqError for a table that lacks columns.
    """
    from mpq.figures import report_figures  # matplotlib is slow to load, and who asks for results_table does not need it

    environment = Environment(loader=PackageLoader("mpq"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    summary = summarize(tables)
    html = (
        _winners_html(summary), _results_html(tables), _groups_html(tables), _timing_html(tables),
        _sensitivity_html(tables, facts.get("noise model", "")),
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(
        title=title, facts=facts, missing=[name for name in REPORTED if table_of(tables, name).is_empty()], summary=summary,
        tables={t.name: t for t in html}, figures=report_figures(tables, base_of(tables, facts)),
    )  # fmt: skip
