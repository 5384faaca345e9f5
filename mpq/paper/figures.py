"""Figures 1 to 9 of the paper's evaluation, from a run's tables, and their way into files.

Axes, units and series are those of the paper. A figure whose data a run does not have is left out,
with a sentence that says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

from mpq.errors import MpqError
from mpq.paper.attention_gain import attention_gains, draw_attention_gains
from mpq.paper.table_1 import markdown, table_1
from mpq.report.accuracy import averages, by_tau, differences
from mpq.report.accuracy_figures import accuracy_against, accuracy_per_task, draw_series, no_x
from mpq.report.figures import predicted_against_measured
from mpq.report.maps import draw_formats, layer_groups
from mpq.report.results import (
    OBJECTIVES,
    Tables,
    base_of,
    plan_results,
    results_table,
    table_of,
)
from mpq.report.style import in_order, legend, log_axis, new_figure, standalone_svg, to_png, to_svg

ONE_SPEED = ", times scaled to one speed of the machine by base's own"


@dataclass(frozen=True)
class Drawn:
    """A figure with its number (`1`, `3a`), what it shows, and why it was left out if it was."""

    number: str
    caption: str
    figure: Figure | None
    why: str = ""


def paper_figures(tables: Tables, base: str = "") -> list[Drawn]:
    """Figures 1, 2, 3a, 3b and 4 to 9 in their order.

    `base` is the base format, read off the plans if left out.
    """
    base = base or base_of(tables, {})
    plans, results = plan_results(tables), results_table(tables)
    rows = differences(tables)
    scores = by_tau(averages(rows)) if not rows.is_empty() else by_tau(rows)
    attention = attention_gains(table_of(tables, "groups"), table_of(tables, "timing"), base)
    timed = plans.filter((pl.col("objective") == "et") & pl.col("measured_ttft_s").is_not_null())
    both = plans.filter((pl.col("predicted_loss_mse") > 0) & (pl.col("measured_loss_mse") > 0))
    paced = timed.filter(pl.col("measured_loss_mse") > 0)
    no_accuracy = "no task's accuracy was evaluated"

    def accuracy(objective: str) -> str:
        if scores.filter(objective=objective).is_empty():
            if rows.is_empty():
                return no_accuracy
            return f"no plan of the objective {objective} was evaluated on every task"
        return ""

    makers: list[tuple[str, str, str, Callable[[], Figure]]] = [
        (
            "1",
            "Time gain of the attention group's configurations: measured, against the sum of its "
            "ops' gains and against MACs",
            ""
            if attention.height > 1
            else "the timing table has no attention group with its ops timed one at a time",
            lambda: draw_attention_gains(attention),
        ),
        (
            "2",
            "Which ops each strategy lowers, at the τ where the integer program lowers nearest to "
            "half of them",
            "" if not table_of(tables, "plans").is_empty() else "the plans table is empty",
            lambda: ops_lowered(table_of(tables, "plans"), table_of(tables, "groups"), base),
        ),
        (
            "3a",
            f"Time gain, predicted and measured{ONE_SPEED}",
            ""
            if timed.filter(pl.col("predicted_gain").is_not_null()).height
            else "no plan's TTFT was both predicted and measured",
            lambda: predicted_against_measured(timed, "gain"),
        ),
        (
            "3b",
            "Loss MSE, predicted and measured",
            "" if both.height else "no plan's loss MSE was both predicted and measured",
            lambda: predicted_against_measured(both, "loss"),
        ),
        (
            "4",
            f"Loss MSE against time gain{ONE_SPEED}",
            "" if paced.height else "no plan has both a measured loss MSE and a measured TTFT",
            lambda: loss_against_gain(results),
        ),
        (
            "5",
            "Accuracy difference, average of the tasks, against TTFT",
            accuracy("et") or no_x(results, "et"),
            lambda: accuracy_against(scores, results, "et"),
        ),
        (
            "6",
            "The groups of one layer",
            "" if not table_of(tables, "groups").is_empty() else "the groups table is empty",
            lambda: layer_groups(table_of(tables, "groups")),
        ),
        (
            "7",
            "Accuracy difference against TTFT, each task",
            (no_accuracy if rows.filter(objective="et").is_empty() else "") or no_x(results, "et"),
            lambda: accuracy_per_task(by_tau(rows), results),
        ),
        (
            "8",
            "Accuracy difference, average of the tasks, against MAC time gained",
            accuracy("tt") or no_x(results, "tt"),
            lambda: accuracy_against(scores, results, "tt"),
        ),
        (
            "9",
            "Accuracy difference, average of the tasks, against memory of the linears' weights",
            accuracy("m") or no_x(results, "m"),
            lambda: accuracy_against(scores, results, "m"),
        ),
    ]
    return [
        Drawn(number, caption, None if why else make(), why)
        for number, caption, why, make in makers
    ]


def ops_lowered(plans: pl.DataFrame, groups: pl.DataFrame, base: str) -> Figure:
    """A row of maps for each objective, a map for each of its strategies, all at one τ.

    Of random the first draw. The τ is that at which the integer program lowers nearest to half of
    the ops, where the strategies differ most.
    """
    panels: list[list[tuple[str, dict[str, str]]]] = []
    for objective in OBJECTIVES:
        of = plans.filter(objective=objective)
        own = (
            of.filter(pl.col("strategy").str.starts_with("ip_"))
            if of["strategy"].str.starts_with("ip_").any()
            else of
        )
        if own.is_empty():
            continue
        shares = (
            own.group_by("tau")
            .agg(share=(pl.col("format") != base).mean())
            .sort((pl.col("share") - 0.5).abs(), "tau")
        )
        at = of.filter(pl.col("tau") == shares["tau"][0])
        row = []
        for strategy in in_order(at["strategy"]):
            mine = at.filter(strategy=strategy)
            first = mine.filter(pl.col("seed") == mine["seed"].min())
            row.append(
                (
                    f"{strategy} ({objective}, τ = {shares['tau'][0]:g})",
                    dict(first.select("op", "format").iter_rows()),
                )
            )
        panels.append(row)
    return draw_formats(panels, groups, base)


def loss_against_gain(results: pl.DataFrame) -> Figure:
    """Figure 4: measured loss MSE (nats², log), mean ± std over seeds, against measured time gain
    (ms, at the speed of timing); all strategies of et."""
    figure, (axes,) = new_figure(4.8, 3.7)
    rows = results.filter(
        (pl.col("objective") == "et") & (pl.col("measured_loss_mse") > 0)
    ).drop_nulls("measured_ttft_s")
    rows = rows.with_columns(gain=pl.col("carried_gain_s") * 1e3).sort("tau")
    for strategy in in_order(rows["strategy"]):
        of = rows.filter(strategy=strategy)
        # an error bar down to zero and below has no place on a logarithmic axis
        spread = of.select(
            s=pl.min_horizontal(pl.col("measured_loss_mse_std"), 0.95 * pl.col("measured_loss_mse"))
        )["s"]
        draw_series(axes, strategy, of["gain"], of["measured_loss_mse"], spread)
    axes.set_xlabel("Time gain, measured (ms)")
    axes.set_ylabel("Loss MSE, measured (nats²)")
    axes.margins(0.06)
    log_axis(axes, "y")
    legend(axes)
    return figure


def write_figures(tables: Tables, folder: Path, base: str = "") -> list[str]:
    """Write figure_1.svg and .png … and table_1.csv and .md into `folder`.

    Returns a sentence for each one left out. The SVGs follow the viewer's light or dark
    preference, the PNGs are on white. Raises MpqError where the folder cannot be written.
    """
    left_out = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for drawn in paper_figures(tables, base):
            if drawn.figure is None:
                left_out.append(f"Figure {drawn.number} is left out: {drawn.why}.")
                continue
            (folder / f"figure_{drawn.number}.png").write_bytes(to_png(drawn.figure, 200))
            svg = standalone_svg(to_svg(drawn.figure, f"figure-{drawn.number}-", drawn.caption))
            (folder / f"figure_{drawn.number}.svg").write_text(svg, encoding="utf-8")
        table = table_1(tables)
        if table.is_empty():
            left_out.append("Table 1 is left out: no task's accuracy was evaluated.")
        else:
            (folder / "table_1.csv").write_text(table.write_csv(), encoding="utf-8")
            (folder / "table_1.md").write_text(markdown(table), encoding="utf-8")
    except OSError as error:
        raise MpqError(
            f"The figures cannot be written to {folder} ({error}): give a folder of yours."
        ) from None
    return left_out
