"""Figures 1 to 9 of the evaluation, each a function from tables to a matplotlib Figure, and their way into files.

Axes, units and series are those of the paper. A figure whose data a run does not have is left out, with a sentence that says
what is missing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpq.errors import MpqError
from mpq.formats.format import FORMATS
from mpq.paper.attention_gain import attention_gains, draw_attention_gains
from mpq.report.accuracy import (
    AVERAGE,
    METRICS,
    TASKS,
    averages,
    by_tau,
    columns_of,
    differences,
    how_averaged,
    markdown,
    name_of_task,
    table_1,
    tasks_of,
)
from mpq.report.drawing import (
    INK,
    LOOKS,
    SMALL,
    dress,
    legend,
    log_axis,
    new_figure,
    standalone_svg,
    to_svg,
)
from mpq.report.figures import (
    AT_ONE_SPEED,
    draw_formats,
    layer_groups,
    predicted_against_measured,
    report_figures,
)
from mpq.report.results import (
    OBJECTIVES,
    STRATEGIES,
    Tables,
    base_of,
    plan_results,
    results_table,
    table_of,
)


@dataclass(frozen=True)
class Drawn:
    """A figure with its number (`1`, `3a`), what it shows, or, where `figure` is None, why it was left out."""

    number: str
    caption: str
    figure: Figure | None
    why: str = ""


def paper_figures(tables: Tables, base: str = "") -> list[Drawn]:
    """Figures 1, 2, 3a, 3b and 4 to 9 in their order. `base` is the base format, read off the plans if left out."""
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
        if scores.filter(pl.col("objective") == objective).is_empty():
            of_objective = (
                no_accuracy
                if rows.is_empty()
                else f"no plan of the objective {objective} was evaluated on every task"
            )
            return of_objective
        return ""

    linear = table_of(tables, "groups").filter(pl.col("parameters") > 0)
    weights = float(linear["parameters"].sum()) * (FORMATS[base].bytes if base in FORMATS else 0.0)
    makers: list[tuple[str, str, str, Callable[[], Figure]]] = [
        (
            "1",
            "Time gain of the attention group's configurations: measured, against the sum of its ops' gains and against MACs",
            ""
            if attention.height > 1
            else "the timing table has no attention group with its ops timed one at a time",
            lambda: draw_attention_gains(attention),
        ),
        (
            "2",
            "Which ops each strategy lowers, at the τ where the integer program lowers nearest to half of them",
            "" if not table_of(tables, "plans").is_empty() else "the plans table is empty",
            lambda: ops_lowered(table_of(tables, "plans"), table_of(tables, "groups"), base),
        ),
        (
            "3a",
            f"Time gain, predicted and measured{AT_ONE_SPEED}",
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
            f"Loss MSE against time gain{AT_ONE_SPEED}",
            "" if paced.height else "no plan has both a measured loss MSE and a measured TTFT",
            lambda: loss_against_gain(results),
        ),
        (
            "5",
            "Accuracy difference, average of the tasks, against TTFT",
            accuracy("et") or _no_x(results, "et"),
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
            (no_accuracy if rows.filter(pl.col("objective") == "et").is_empty() else "")
            or _no_x(results, "et"),
            lambda: accuracy_per_task(by_tau(rows), results),
        ),
        (
            "8",
            "Accuracy difference, average of the tasks, against MAC time gained",
            accuracy("tt") or _no_x(results, "tt"),
            lambda: accuracy_against(scores, results, "tt"),
        ),
        (
            "9",
            "Accuracy difference, average of the tasks, against memory of the model's linear weights",
            accuracy("m") or _no_x(results, "m"),
            lambda: accuracy_against(scores, results, "m", weights),
        ),
    ]
    return [
        Drawn(number, caption, None if why else make(), why)
        for number, caption, why, make in makers
    ]


def _no_x(results: pl.DataFrame, objective: str) -> str:
    """Why an objective's axis cannot be drawn, or nothing."""
    if _with_x(results, objective).is_empty():
        return (
            "no plan's TTFT was measured or predicted"
            if objective == "et"
            else f"no plan of the objective {objective} has a gain"
        )
    return ""


def _with_x(results: pl.DataFrame, objective: str, weights: float = 0.0) -> pl.DataFrame:
    """The objective's results with `x` (ms, billion BF16 MACs, MB): TTFT measured if any was, else predicted."""
    of = results.filter(pl.col("objective") == objective)
    unit = OBJECTIVES[objective].scale
    if objective == "et":
        x = pl.col(
            "carried_ttft_s" if of["carried_ttft_s"].is_not_null().any() else "predicted_ttft_s"
        )
    else:
        x = weights - pl.col("predicted_gain") if objective == "m" else pl.col("predicted_gain")
    return of.with_columns(x=x * unit).drop_nulls("x")


def _strategies(rows: pl.DataFrame) -> list[str]:
    return sorted(
        rows["strategy"].unique(), key=lambda s: (STRATEGIES.index(s) if s in STRATEGIES else 99, s)
    )


def ops_lowered(plans: pl.DataFrame, groups: pl.DataFrame, base: str) -> Figure:
    """Small multiples: a row for each objective, a map for each of its strategies, all at one τ; random's first draw.

    The τ is that at which the integer program lowers nearest to half of the ops, where the strategies differ most.
    """
    panels: list[list[tuple[str, dict[str, str]]]] = []
    for objective in OBJECTIVES:
        of = plans.filter(pl.col("objective") == objective)
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
        for strategy in _strategies(at):
            mine = at.filter(pl.col("strategy") == strategy)
            first = mine.filter(pl.col("seed") == mine["seed"].min())
            row.append(
                (
                    f"{strategy} ({objective}, τ = {shares['tau'][0]:g})",
                    dict(first.select("op", "format").iter_rows()),
                )
            )
        panels.append(row)
    return draw_formats(panels, groups, base)


def _series(axes: Axes, strategy: str, x: pl.Series, y: pl.Series, error: pl.Series) -> None:
    colour, marker, line = LOOKS.get(strategy, (INK, "D", "-."))
    top = 3 if strategy.startswith("ip_") else 2
    axes.errorbar(
        x.to_numpy(),
        y.to_numpy(),
        error.fill_null(0.0).to_numpy(),
        color=colour,
        marker=marker,
        linestyle=line,
        label=strategy,
        markersize=5.5,
        linewidth=1.5,
        elinewidth=1,
        capsize=2.5,
        zorder=top,
    )


def loss_against_gain(results: pl.DataFrame) -> Figure:
    """Figure 4: measured loss MSE (nats², log), mean ± std over seeds, against measured time gain (ms, at the speed of timing); all et
    strategies."""
    figure, (axes,) = new_figure(4.8, 3.7)
    rows = results.filter(
        (pl.col("objective") == "et") & (pl.col("measured_loss_mse") > 0)
    ).drop_nulls("measured_ttft_s")
    rows = rows.with_columns(gain=pl.col("carried_gain_s") * 1e3).sort("tau")
    for strategy in _strategies(rows):
        of = rows.filter(pl.col("strategy") == strategy)
        # an error bar down to zero and below has no place on a logarithmic axis
        spread = of.select(
            s=pl.min_horizontal(pl.col("measured_loss_mse_std"), 0.95 * pl.col("measured_loss_mse"))
        )["s"]
        _series(axes, strategy, of["gain"], of["measured_loss_mse"], spread)
    axes.set_xlabel("Time gain, measured (ms)")
    axes.set_ylabel("Loss MSE, measured (nats²)")
    axes.margins(0.06)
    log_axis(axes, "y")
    legend(axes)
    return figure


def accuracy_against(
    scores: pl.DataFrame, results: pl.DataFrame, objective: str, weights: float = 0.0
) -> Figure:
    """Figures 5, 8 and 9: accuracy difference to base (points), average of the tasks, mean ± std over seeds.

    Against TTFT in ms (`et`), MAC time gained (`tt`), or the memory of linear weights in MB (`m`, `weights` bytes in base).
    """
    figure, (axes,) = new_figure(4.8, 3.7)
    _draw_accuracy(axes, scores.filter(pl.col("task") == AVERAGE), results, objective, weights)
    axes.set_ylabel("Accuracy difference to base (points)")
    axes.set_xlabel(_x_label(results, objective))
    legend(axes)
    return figure


def _x_label(results: pl.DataFrame, objective: str) -> str:
    if objective == "et":
        measured = (
            results.filter(pl.col("objective") == "et")["measured_ttft_s"].is_not_null().any()
        )
        return f"TTFT, {'measured' if measured else 'predicted'} (ms)"
    return (
        "MAC time gained (billion BF16 MACs)"
        if objective == "tt"
        else "Memory of linear weights (MB)"
    )


def _draw_accuracy(
    axes: Axes, scores: pl.DataFrame, results: pl.DataFrame, objective: str, weights: float = 0.0
) -> None:
    rows = (
        _with_x(results, objective, weights)
        .join(scores, on=["objective", "strategy", "tau"])
        .sort("tau")
    )
    axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="base model")
    for strategy in _strategies(rows):
        of = rows.filter(pl.col("strategy") == strategy)
        _series(axes, strategy, of["x"], of["mean"], of["std"])
    axes.margins(0.06)


def accuracy_per_task(scores: pl.DataFrame, results: pl.DataFrame) -> Figure:
    """Figure 7: figure 5 for each task, and the perplexity difference (%) where a task has one. `scores` is `by_tau`'s."""
    of = scores.filter(pl.col("objective") == "et")
    panels = [
        (task, metric)
        for task in tasks_of(of)
        for metric in ("acc", "perplexity")
        if not of.filter((pl.col("task") == task) & (pl.col("metric") == metric)).is_empty()
    ]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.6 * lines + 0.35), layout="constrained")
    for i, (task, metric) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, i + 1)
        dress(axes)
        _draw_accuracy(
            axes, of.filter((pl.col("task") == task) & (pl.col("metric") == metric)), results, "et"
        )
        axes.set_title(
            f"{name_of_task(task)}, {'accuracy' if metric == 'acc' else 'perplexity'}",
            fontsize=9.5,
            color=INK,
            loc="left",
        )
        axes.set_ylabel("Difference (points)" if metric == "acc" else "Difference (%)")
        axes.set_xlabel(_x_label(results, "et"))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=4,
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
    )
    return figure


SECTIONS = {
    "1": "predicted",
    "2": "map",
    "3a": "predicted",
    "3b": "predicted",
    "4": "frontier",
    "5": "accuracy",
    "6": "groups",
    "7": "accuracy",
    "8": "accuracy",
    "9": "accuracy",
}


def page_figures(
    tables: Tables, base: str
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, list[str]]]:
    """The report's figures as inline SVG, section → (caption, markup), numbered ones first; and section → what is left out, why."""
    shown: dict[str, list[tuple[str, str]]] = {section: [] for section in SECTIONS.values()}
    left_out: dict[str, list[str]] = {section: [] for section in SECTIONS.values()}
    for drawn in paper_figures(tables, base):
        section, caption = SECTIONS[drawn.number], f"Figure {drawn.number}. {drawn.caption}"
        if drawn.figure is None:
            left_out[section].append(f"Figure {drawn.number} is left out: {drawn.why}.")
        else:
            shown[section].append(
                (caption, to_svg(drawn.figure, f"figure-{drawn.number}-", caption))
            )
    for section, pictures in report_figures(tables, base).items():
        shown[section] += pictures
    return shown, left_out


def page_rows(tables: Tables, base: str) -> dict[str, Any]:
    """The rows behind the numbered figures, for the page's sortable tables: Table 1, accuracy by τ, plans, attention."""
    rows, first = differences(tables), table_1(tables)
    scores = by_tau(pl.concat([averages(rows), rows])) if not rows.is_empty() else by_tau(rows)
    plans = plan_results(tables).with_columns(
        ratio=pl.when(pl.col("predicted_loss_mse") > 0).then(
            pl.col("measured_loss_mse") / pl.col("predicted_loss_mse")
        ),
        measured_gain_s=pl.when(pl.col("objective") == "et").then(pl.col("carried_gain_s")),
        predicted_gain_s=pl.when(pl.col("objective") == "et").then(pl.col("predicted_gain")),
    )
    attention = attention_gains(table_of(tables, "groups"), table_of(tables, "timing"), base)
    return {
        "table_1": first.to_dicts(),
        "table_1_columns": columns_of(first),
        "table_1_note": "" if first.is_empty() else how_averaged(first),
        "accuracy": scores.with_columns(
            pl.col("task").replace(TASKS), pl.col("metric").replace(METRICS)
        ).to_dicts(),
        "plans": plans.to_dicts(),
        "attention": attention.with_columns(pl.col("configuration").list.join(" ")).to_dicts()
        if attention.height
        else [],
    }


def write_figures(tables: Tables, folder: Path, base: str = "") -> list[str]:
    """Writes figure_1.svg and .png … and table_1.csv and .md into `folder`; returns a sentence for each one left out.

    The SVGs follow the viewer's light or dark preference, the PNGs are on white. Raises MpqError where the folder
    cannot be written.
    """
    left_out = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for drawn in paper_figures(tables, base):
            if drawn.figure is None:
                left_out.append(f"Figure {drawn.number} is left out: {drawn.why}.")
                continue
            out = io.BytesIO()
            drawn.figure.savefig(out, format="png", dpi=200, facecolor="white")
            (folder / f"figure_{drawn.number}.png").write_bytes(out.getvalue())
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
            f"The figures cannot be written to {folder} ({error}): give a folder that can be written."
        ) from None
    return left_out
