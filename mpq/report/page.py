"""A run told to people: the results table, a summary computed from the numbers, and one HTML file that needs nothing else.

Everything here is read off the tables, so a report can be written again from any finished run. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined

from mpq.report.results import (
    OBJECTIVES,
    Objective,
    Tables,
    base_of,
    milliseconds,
    results_table,
    table_of,
)
from mpq.report.summary import Summary, summarize

REPORTED = ("groups", "timing", "solutions", "plans", "evaluation", "sensitivity", "loss")
TOP_OPS = 40


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
    ratio = pl.when(pl.col("predicted_loss_mse") > 0).then(
        pl.col("measured_loss_mse") / pl.col("predicted_loss_mse")
    )
    error = pl.col("predicted_ttft_s") / pl.col("carried_ttft_s") - 1
    results = results_table(tables).with_columns(ratio=ratio, ttft_error=error).to_dicts()
    groups = (
        table_of(tables, "groups").sort("order").group_by("group", "signature", maintain_order=True)
    )
    timing = table_of(tables, "timing").sort("signature", "gain_s", descending=[False, True])
    return {
        "winners": [
            {
                "objective": OBJECTIVES[w.objective].name
                if w.objective in OBJECTIVES
                else w.objective,
                "tau": w.tau,
                "most": " = ".join(w.strategies),
                "gain": _amount(w.objective, w.gain),
                "share": w.share,
                "how": "measured" if w.measured else "computed",
                "next": w.second and f"{w.second}: {_amount(w.objective, w.second_gain)}",
            }
            for w in summary.winners
        ],
        "results": [
            {**row, "gain": _amount(row["objective"], row["predicted_gain"])} for row in results
        ],
        "groups": groups.agg(
            pl.col("op").str.join(", "), pl.col("macs").sum(), pl.col("parameters").sum()
        ).to_dicts(),
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
    by_op = chosen.pivot(
        "format", index="op", values="loss_mse", aggregate_function="sum", sort_columns=True
    )
    formats = [f for f in by_op.columns if f != "op" and (by_op[f] > 0).any()]
    ranked = by_op.with_columns(top=pl.max_horizontal(formats) if formats else pl.lit(0.0)).sort(
        "top", descending=True
    )
    shared = ranked.with_columns(share=pl.col("top") / pl.col("top").sum())
    return Sensitivities(model, formats, shared.head(TOP_OPS).to_dicts(), ranked.height)


def write_report(tables: Tables, title: str, facts: Mapping[str, str]) -> str:
    """One self-contained HTML page on a run: it fetches nothing and works from a file, offline.

    `tables` are the run's tables by name (REPORTED), `facts` what is told of the run (model, device, versions).
    A missing or empty table leaves a sentence in its section. Raises MpqError for a table that lacks columns.
    """
    from mpq.paper.figures import (  # matplotlib is slow to load; results_table does not need it
        page_figures,
        page_rows,
    )
    from mpq.report.findings import find, rows_of

    pages = Environment(
        loader=PackageLoader("mpq.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
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
