"""Pictures of what plans cost on tasks, against what they gain."""

from __future__ import annotations

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpq.report.accuracy import AVERAGE, name_of_task, tasks_of
from mpq.report.results import OBJECTIVES, name_of_time
from mpq.report.style import (
    INK,
    dress,
    figure_legend,
    handles_of,
    in_order,
    legend,
    legend_name,
    look,
    new_figure,
)


def no_x(results: pl.DataFrame, objective: str) -> str:
    """Why an objective's axis cannot be drawn, or nothing."""
    if not with_x(results, objective).is_empty():
        return ""
    if objective == "et":
        return "no plan's TTFT was measured or predicted"
    return f"no plan of the objective {objective} has a gain"


def with_x(results: pl.DataFrame, objective: str) -> pl.DataFrame:
    """The objective's results with `x`, what they gain.

    For et TTFT, or the time of whole answers (ms), measured if any was, else predicted; for tt MAC
    time gained (billion BF16 MACs); for m memory of the linears' weights, and of the cache where
    that was decided (MB).
    """
    of = results.filter(objective=objective)
    timed = of["carried_time_s"].is_not_null().any()
    x = {
        "et": pl.col("carried_time_s" if timed else "predicted_time_s"),
        "tt": pl.col("predicted_gain"),
        "m": pl.col("base_weight_bytes")
        + pl.col("base_cache_bytes").fill_null(0.0)
        - pl.col("predicted_gain"),
    }[objective]
    return of.with_columns(x=x * OBJECTIVES[objective].scale).drop_nulls("x")


def draw_series(axes: Axes, strategy: str, x: pl.Series, y: pl.Series, error: pl.Series) -> None:
    """A strategy's marks with error bars."""
    axes.errorbar(
        x.to_numpy(),
        y.to_numpy(),
        error.fill_null(0.0).to_numpy(),
        **(look(strategy) | {"markersize": 5.5}),
        label=legend_name(strategy),
        elinewidth=1,
        capsize=2.5,
    )


def accuracy_against(scores: pl.DataFrame, results: pl.DataFrame, objective: str) -> Figure:
    """Accuracy difference to base (points), average of the tasks, mean ± std over seeds.

    Against what `with_x` says of the objective: the paper's figures 5, 8 and 9. `scores` is
    `accuracy.by_tau`'s, with the average among the tasks.
    """
    figure, (axes,) = new_figure(4.8, 3.7)
    _draw_accuracy(axes, scores.filter(task=AVERAGE), results, objective)
    axes.set_ylabel("Accuracy difference to base (points)")
    axes.set_xlabel(_x_label(results, objective))
    legend(axes)
    return figure


def _x_label(results: pl.DataFrame, objective: str) -> str:
    if objective == "tt":
        return "MAC time gained (billion BF16 MACs)"
    if objective == "m":
        caches = results["base_cache_bytes"].is_not_null().any()
        return f"Memory of linear weights{' and KV cache' if caches else ''} (MB)"
    of = results.filter(objective="et")
    how = "measured" if of["measured_ttft_s"].is_not_null().any() else "predicted"
    return f"{name_of_time(of)}, {how} (ms)"


def _draw_accuracy(axes: Axes, scores: pl.DataFrame, results: pl.DataFrame, objective: str) -> None:
    rows = with_x(results, objective).join(scores, on=["objective", "strategy", "tau"]).sort("tau")
    axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="base model")
    for strategy in in_order(rows["strategy"]):
        of = rows.filter(strategy=strategy)
        draw_series(axes, strategy, of["x"], of["mean"], of["std"])
    axes.margins(0.06)


def accuracy_per_task(scores: pl.DataFrame, results: pl.DataFrame) -> Figure:
    """Each task's accuracy difference (points) against TTFT, and its perplexity difference (%)
    where it has one: the paper's figure 7. `scores` is `accuracy.by_tau`'s."""
    of = scores.filter(objective="et")
    panels = [
        (task, metric)
        for task in tasks_of(of)
        for metric in ("acc", "perplexity")
        if not of.filter(task=task, metric=metric).is_empty()
    ]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.6 * lines + 0.35), layout="constrained")
    for i, (task, metric) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, i + 1)
        dress(axes)
        here = of.filter(task=task, metric=metric)
        _draw_accuracy(axes, here, results, "et")
        axes.set_title(
            f"{name_of_task(task)}, {'accuracy' if metric == 'acc' else 'perplexity'}",
            fontsize=9.5,
            color=INK,
            loc="left",
        )
        axes.set_ylabel("Difference (points)" if metric == "acc" else "Difference (%)")
        axes.set_xlabel(_x_label(results, "et"))
    figure_legend(figure, handles_of(figure), "outside upper center", 4)
    return figure
