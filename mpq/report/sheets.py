"""The tables of the report's page: which rows and columns each has, and how a cell is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from mpq.report.accuracy import METRICS, TASKS, averages, by_tau, differences
from mpq.report.best import Outline, outline, percent, uniform_outlines
from mpq.report.comparisons import comparison_rows
from mpq.report.findings import Findings
from mpq.report.results import (
    OBJECTIVES,
    Gain,
    Objective,
    Tables,
    milliseconds,
    plus_minus,
    results_table,
    table_of,
)
from mpq.report.summary import Summary
from mpq.timing.answer import answers

TOP_OPS = 40
TOP_GROUPS = 1000
Column = tuple[str, str, str]  # heading, key, style
# of answers of several tokens: of plans, and of configurations
_TPOT: list[Column] = [
    ("Each further token (ms)", "measured_tpot_s", "ms"),
    ("predicted", "predicted_tpot_s", "ms"),
    ("of base", "base_tpot_s", "ms"),
    ("Tokens of an answer", "output", "count"),
]
_TOKENS: list[Column] = [
    ("Each further token (ms)", "tpot_s", "ms"),
    ("base (ms)", "base_tpot_s", "ms"),
    ("Tokens of an answer", "output", "count"),
]


@dataclass(frozen=True)
class Sheet:
    """A table of the page. `<key>_std` beside a key of a row is written behind it, after a ±."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    tall: bool = True  # long enough to scroll by itself


def write(value: Any, style: str, spread: float | None = None) -> str:
    """A cell's text: the value in its style, ± its spread. Without a style the value as it is."""
    if value is None or value == "":
        return "–"
    styles: dict[str, Callable[[Any], str]] = {
        "sci": lambda v: f"{v:.3g}" if v == 0 or 1e-3 <= abs(v) < 1e5 else f"{v:.2e}",
        "ms": milliseconds,
        "mb": lambda v: f"{v * 1e-6:.4g}",
        "share": lambda v: f"{v:.1%}",
        "percent": percent,
        "number": lambda v: f"{v:.4g}",
        "points": lambda v: f"{v:.3f}".replace("-", "−"),
        "count": lambda v: f"{v:,}",
        "": str,
    }
    text = styles[style](value)
    if spread is None:
        return text
    if style == "ms":
        return plus_minus(value * 1e3, spread * 1e3)
    return f"{text} ± {spread:.2g}"


def choice(tables: Tables, summary: Summary) -> Sheet:
    """The plan to run beside the base model and everything in one format."""
    best = summary.best.outline if summary.best else None
    shown = [("this plan", best)] if best else []
    shown += [
        (in_one_format(of.strategy), of)
        for of in uniform_outlines(tables, best.objective if best else "et")
    ]
    any_of = next((of for _, of in shown if of.base_ttft_s is not None), best)
    rows = [_asked(what, of) for what, of in shown]
    if any_of and any_of.perplexity and any_of.perplexity_change is not None:
        rows.insert(0, _of_base(any_of))
    tokens = next((of.output for _, of in shown if of.tpot_s is not None), None)
    cached = any(of.cache_bytes is not None for _, of in shown)
    return Sheet(
        "choice",
        "Weights are those of the linears; ± is a 95 % interval. "
        "“In bound”: the measured loss stays within the (largest) bound that was set."
        + (f" Saved: of an answer of {tokens} tokens." if tokens else ""),
        [
            ("", "what", ""),
            ("Time to first token (ms)", "ttft_s", "ms"),
            *([("Each further token (ms)", "tpot_s", "ms")] if tokens else []),
            ("saved (ms)", "gain_s", "ms"),
            ("Weights (MB)", "weight_bytes", "mb"),
            *([("KV cache (MB)", "cache_bytes", "mb")] if cached else []),
            ("Perplexity", "perplexity", "number"),
            ("change", "perplexity_change", "percent"),
            ("In bound", "within", ""),
        ],
        rows,
        tall=False,
    )


def in_one_format(strategy: str) -> str:
    """`uniform_int8_but_head` as `all in int8 but the head`."""
    name = strategy.removeprefix("uniform_")
    if name.endswith("_but_head"):
        return f"all in {name.removesuffix('_but_head')} but the head"
    return f"all in {name}"


def _asked(what: str, of: Outline) -> dict[str, Any]:
    within = {None: None, True: "yes", False: "no"}[of.within]
    return {**vars(of), "what": what, "gain_s_std": of.gain_half_s, "within": within}


def _of_base(of: Outline) -> dict[str, Any]:
    perplexity = (of.perplexity or 0.0) / (1 + (of.perplexity_change or 0.0))
    return {
        "what": "base model",
        "ttft_s": of.base_ttft_s,
        "tpot_s": of.base_tpot_s,
        "gain_s": None,
        "weight_bytes": of.base_weight_bytes,
        "cache_bytes": of.base_cache_bytes,
        "perplexity": perplexity,
        "perplexity_change": None,
        "within": None,
    }


def standings(summary: Summary) -> Sheet:
    """The integer program against each baseline at each τ."""
    rows = []
    for s in summary.standings:
        verdicts = [("ahead", s.ahead), ("not told apart", s.level), ("behind", s.behind)]
        of = {other: verdict for verdict, others in verdicts for other in others}
        rows += [
            {
                "own": s.own,
                "bound": s.bound,
                "gain": amount(s.objective, s.gain),
                "share": s.share,
                "how": "measured" if s.gain.measured else "computed",
                "other": other,
                "other_gain": amount(s.objective, gain),
                "verdict": of[other],
            }
            for other, gain in s.others
        ]
    return Sheet(
        "standings",
        "Who gains more under the same bound. Ahead or behind: the 95 % intervals of the two gains "
        "don't overlap.",
        [
            ("Strategy", "own", ""),
            ("Bound", "bound", ""),
            ("Gain", "gain", ""),
            ("of base", "share", "share"),
            ("is", "verdict", ""),
            ("of, from", "other", ""),
            ("its gain", "other_gain", ""),
            ("", "how", ""),
        ],
        rows,
    )


def amount(objective: str, gain: Gain) -> str:
    """A gain with half its interval and its unit: `8.1 ± 0.9 ms`."""
    unit = OBJECTIVES.get(objective, Objective(objective, "gain", "", 1.0))
    known = gain.low is not None and gain.high is not None
    half = (gain.high - gain.low) / 2 * unit.scale if known else None  # type: ignore[operator]
    return f"{plus_minus(gain.value * unit.scale, half)} {unit.unit}".rstrip()


def results(tables: Tables) -> Sheet:
    """Every plan; what people ask first stands first."""
    table, rows = results_table(tables), []
    cached = table["cache_bytes"].is_not_null().any()
    for row in table.iter_rows(named=True):
        of, predicted = outline(row), row["predicted_loss_mse"]
        gain, error = row["predicted_gain"], row["predicted_gain_error"]
        told = None
        if gain is not None:
            low, high = (None, None) if error is None else (gain - error, gain + error)
            told = amount(row["objective"], Gain(gain, low, high, False))
        loss, carried = row["measured_loss_mse"], row["carried_ttft_s"]
        known = loss is not None and predicted
        timed = carried is not None and row["predicted_ttft_s"] is not None
        rows.append(
            {
                **row,
                "tau": row["tau"] if row["budget"] is not None or row["kl_bound"] is None else None,
                "gain_s": of.gain_s,
                "gain_s_std": of.gain_half_s,
                "perplexity_change": of.perplexity_change,
                "ratio": loss / predicted if known else None,
                "ttft_error": row["predicted_ttft_s"] / carried - 1 if timed else None,
                "gain": told,
            }
        )
    return Sheet(
        "results",
        "Means over seeds (and over random's draws), ± their standard deviation; for the time "
        "saved ± is half its 95 % interval. – where nothing was predicted or measured. The further "
        "columns are to the right.",
        [
            ("Strategy", "strategy", ""),
            ("For", "objective", ""),
            ("τ", "tau", "number"),
            ("TTFT (ms)", "measured_ttft_s", "ms"),
            ("saved (ms)", "gain_s", "ms"),
            ("Weights (MB)", "weight_bytes", "mb"),
            *([("KV cache (MB)", "cache_bytes", "mb")] if cached else []),
            ("Perplexity change", "perplexity_change", "percent"),
            ("Loss MSE (nats²)", "measured_loss_mse", "sci"),
            ("its bound", "budget", "sci"),
            ("predicted", "predicted_loss_mse", "sci"),
            ("± half its 95 % interval", "predicted_loss_mse_error", "sci"),
            ("measured / predicted", "ratio", "number"),
            ("predicted with signs and drift", "predicted_signed_mse", "sci"),
            ("KL (nats per token)", "measured_kl", "sci"),
            ("its bound", "kl_bound", "sci"),
            ("predicted", "predicted_kl", "sci"),
            ("± half its 95 % interval", "predicted_kl_error", "sci"),
            ("measured before delivery", "checked_kl", "sci"),
            ("Chance that a bound is broken", "risk", "share"),
            ("TTFT predicted (ms)", "predicted_ttft_s", "ms"),
            ("its error, at one speed of the machine", "ttft_error", "share"),
            ("TTFT of base (ms)", "base_ttft_s", "ms"),
            *(_TPOT if any(row["predicted_tpot_s"] for row in rows) else []),
            ("Gain predicted", "gain", ""),
            ("Perplexity", "perplexity", "number"),
            ("of base", "base_perplexity", "number"),
            ("Ops lowered", "share_lowered", "share"),
            ("Seeds", "seeds", "count"),
            ("Solver", "solver", ""),
            ("Status", "status", ""),
            ("Note", "note", ""),
        ],
        rows,
    )


def accuracy(tables: Tables) -> Sheet:
    """The difference to base on each task, for each plan."""
    rows = differences(tables)
    scores = by_tau(pl.concat([averages(rows), rows])) if not rows.is_empty() else by_tau(rows)
    named = scores.with_columns(pl.col("task").replace(TASKS), pl.col("metric").replace(METRICS))
    return Sheet(
        "accuracy",
        "Difference to base on each task: mean and standard deviation over seeds and draws.",
        [
            ("Strategy", "strategy", ""),
            ("For", "objective", ""),
            ("τ", "tau", "number"),
            ("Task", "task", ""),
            ("Metric", "metric", ""),
            ("Difference", "mean", "points"),
            ("Standard deviation", "std", "number"),
            ("Repetitions", "n", "count"),
        ],
        named.to_dicts(),
    )


def additivity(found: Findings) -> Sheet:
    """Whether predictions hold: measured over predicted."""
    return Sheet(
        "additivity",
        "Measured over predicted, of all plans that have both. The method rests on this: loss MSE "
        "and KL add up over ops, time over groups. Times are scaled to one speed of the machine.",
        [
            ("Quantity", "quantity", ""),
            ("For", "objective", ""),
            ("Different plans", "plans", "count"),
            ("5 % quantile", "low", "number"),
            ("Median", "median", "number"),
            ("95 % quantile", "high", "number"),
            ("Median error", "error", "share"),
        ],
        [vars(a) for a in found.additivity],
        tall=False,
    )


def comparisons(found: Findings) -> Sheet:
    """The integer programs against their baselines in what plans cost."""
    return Sheet(
        "comparisons",
        "What plans cost, each integer program against its baselines, mean over τ. The standard "
        "error is that of the difference, from repetitions.",
        [
            ("Own", "own", ""),
            ("Other", "other", ""),
            ("Quantity", "quantity", ""),
            ("Own − other", "difference", "number"),
            ("Standard error", "error", "number"),
            ("Exceeds it", "clear", ""),
            ("τ", "taus", "count"),
            ("better at", "better", "count"),
            ("clearly at", "clearly", "count"),
        ],
        comparison_rows(found.comparisons),
    )


def groups(tables: Tables) -> Sheet:
    """Which ops are decided together."""
    found = (
        table_of(tables, "groups")
        .sort("order")
        .group_by("group", "signature", maintain_order=True)
        .agg(pl.col("op").str.join(", "), pl.col("macs").sum(), pl.col("parameters").sum())
    )
    said = "Ops decided and timed together; groups of one signature do the same work."
    if found.height > TOP_GROUPS:
        said += f" The first {TOP_GROUPS} of {found.height}; the table `groups` has all."
    return Sheet(
        "groups",
        said,
        [
            ("Group", "group", "count"),
            ("Ops", "op", ""),
            ("Signature", "signature", ""),
            ("MACs", "macs", "count"),
            ("Parameters", "parameters", "count"),
        ],
        found.head(TOP_GROUPS).to_dicts(),
    )


def timing(tables: Tables) -> Sheet:
    """What each configuration gains."""
    found = table_of(tables, "timing").sort("signature", "gain_s", descending=[False, True])
    return Sheet(
        "timing",
        "Each configuration of each signature, timed with the rest in base. "
        "CSV has times in seconds.",
        [
            ("Signature", "signature", ""),
            ("Configuration, in op order", "configuration", ""),
            ("TTFT (ms)", "ttft_s", "ms"),
            ("base (ms)", "base_ttft_s", "ms"),
            *(_TOKENS if answers(found) else []),
            ("Gain of one instance (ms)", "gain_s", "ms"),
            ("interval from (ms)", "gain_ci_low_s", "ms"),
            ("to (ms)", "gain_ci_high_s", "ms"),
            ("surely not zero", "significant", ""),
            ("Instances timed", "instances", "count"),
            ("Repeats", "repeats", "count"),
            ("disturbed", "disturbed", "count"),
            ("Batch", "batch", "count"),
            ("Length", "length", "count"),
            ("Device", "device", ""),
            ("Load average", "load_average", "number"),
        ],
        found.with_columns(pl.col("configuration").list.join(" ")).to_dicts(),
    )


def sensitivity(tables: Tables, noise_model: str) -> Sheet:
    """The ops by the loss MSE of lowering one alone, a column for each format, largest first."""
    rows = table_of(tables, "sensitivity")
    models = rows["noise_model"].unique().sort().to_list()
    model = noise_model if noise_model in models else next(iter(models), "")
    by_op = rows.filter(noise_model=model).pivot(
        "format", index="op", values="loss_mse", aggregate_function="sum", sort_columns=True
    )
    formats = [f for f in by_op.columns if f != "op" and (by_op[f] > 0).any()]
    top = pl.max_horizontal(formats) if formats else pl.lit(0.0)
    ranked = by_op.with_columns(top=top).sort("top", descending=True)
    shared = ranked.with_columns(share=pl.col("top") / pl.col("top").sum()).head(TOP_OPS)
    return Sheet(
        "sensitivity",
        f"Loss MSE of one op lowered alone, noise model {model}; the {shared.height} largest of "
        f"{ranked.height} ops. The share is that of the coarsest format.",
        [
            ("Op", "op", ""),
            *((f"{f} (nats²)", f, "sci") for f in formats),
            ("Share of all ops", "share", "share"),
        ],
        shared.to_dicts(),
    )
