"""What the paper's evaluation adds to a run's report: its numbered figures, Table 1, the rows
behind them."""

from __future__ import annotations

import polars as pl

from mpq.paper.attention_gain import attention_gains
from mpq.paper.figures import paper_figures
from mpq.paper.table_1 import columns_of, how_averaged, table_1
from mpq.report.page import Appendix
from mpq.report.results import Tables, base_of, plan_results, table_of
from mpq.report.sheets import Sheet
from mpq.report.style import to_svg


def appendix(tables: Tables, base: str = "") -> Appendix:
    """Figures 1 to 9 and Table 1 for the report's page (`write_report(…, appendix=…)`).

    `base` is the base format, read off the plans if left out.
    """
    base = base or base_of(tables, {})
    shown: list[tuple[str, str]] = []
    why: dict[str, list[str]] = {}
    for drawn in paper_figures(tables, base):
        if drawn.figure is None:
            why.setdefault(drawn.why, []).append(f"figure {drawn.number}")
            continue
        caption = f"Figure {drawn.number}. {drawn.caption}"
        shown.append((caption, to_svg(drawn.figure, f"figure-{drawn.number}-", caption)))
    first = _table_1(tables)
    if not first.rows:
        why.setdefault("no task's accuracy was evaluated", []).append("Table 1")
    left_out = "; ".join(f"{', '.join(what)} ({reason})" for reason, what in why.items())
    return Appendix(
        "The paper's figures and Table 1",
        shown,
        [first, _plans(tables), _attention(tables, base)],
        f"Left out: {left_out}." if left_out else "",
    )


def _table_1(tables: Tables) -> Sheet:
    first = table_1(tables)
    return Sheet(
        "table-1",
        "" if first.is_empty() else f"Table 1. {how_averaged(first)}",
        [
            ("Strategy", "strategy", ""),
            ("Objective", "objective", ""),
            *((heading, column, "points") for column, heading in columns_of(first)),
            ("τ", "taus", "count"),
            ("Repetitions at each", "repeats", "count"),
        ],
        first.to_dicts(),
        tall=False,
    )


def _plans(tables: Tables) -> Sheet:
    timed = pl.when(pl.col("objective") == "et")
    predicted = pl.col("predicted_loss_mse")
    plans = plan_results(tables).with_columns(
        ratio=pl.when(predicted > 0).then(pl.col("measured_loss_mse") / predicted),
        measured_gain_s=timed.then(pl.col("carried_gain_s")),
        predicted_gain_s=timed.then(pl.col("predicted_gain")),
    )
    return Sheet(
        "plans",
        "Behind figures 3 and 4: every plan, the draws of random apart.",
        [
            ("Strategy", "strategy", ""),
            ("Objective", "objective", ""),
            ("τ", "tau", "number"),
            ("Draw", "plan_seed", "count"),
            ("Loss MSE predicted (nats²)", "predicted_loss_mse", "sci"),
            ("measured (nats²)", "measured_loss_mse", "sci"),
            ("measured / predicted", "ratio", "number"),
            ("TTFT predicted (ms)", "predicted_ttft_s", "ms"),
            ("measured (ms)", "measured_ttft_s", "ms"),
            ("Time gain predicted (ms)", "predicted_gain_s", "ms"),
            ("measured (ms), at the speed of timing", "measured_gain_s", "ms"),
        ],
        plans.to_dicts(),
    )


def _attention(tables: Tables, base: str) -> Sheet:
    rows = attention_gains(table_of(tables, "groups"), table_of(tables, "timing"), base)
    if rows.height:
        rows = rows.with_columns(pl.col("configuration").list.join(" "))
    return Sheet(
        "attention",
        "Behind figure 1: the attention group's configurations, formats in op order.",
        [
            ("Configuration", "configuration", ""),
            ("Gain measured (ms)", "gain_s", "ms"),
            ("interval from (ms)", "gain_ci_low_s", "ms"),
            ("to (ms)", "gain_ci_high_s", "ms"),
            ("Sum of its ops' gains (ms)", "sum_s", "ms"),
            ("MAC time gained (BF16 MACs)", "macs", "sci"),
            ("Ops lowered", "lowered", "count"),
        ],
        rows.to_dicts(),
    )
