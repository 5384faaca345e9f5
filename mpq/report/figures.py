"""The report's pictures of what plans gain and cost: the frontier, and predicted against measured.

Each is a function from a table to a matplotlib Figure; style.py says how they look and how they
get into HTML. A strategy is a line over τ; a uniform plan, of no τ, is a point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mpq.report.accuracy import AVERAGE, averages, by_tau, differences
from mpq.report.accuracy_figures import accuracy_against, accuracy_per_task, no_x
from mpq.report.calibration import Calibration
from mpq.report.calibration_figure import enough_calibration
from mpq.report.maps import format_map, layer_groups
from mpq.report.results import (
    OBJECTIVES,
    STRATEGIES,
    Tables,
    bound_of,
    name_of_time,
    plan_results,
    results_table,
    sentence,
    table_of,
)
from mpq.report.style import (
    INK,
    SMALL,
    dress,
    in_order,
    legend,
    legend_name,
    log_axis,
    look,
    new_figure,
    to_png,
    to_svg,
)

if TYPE_CHECKING:
    from mpq.report.beside import Beside

Quantity = Literal["loss", "kl", "ttft", "gain"]
Pictures = list[tuple[str, str]]  # caption, SVG


def frontier(results: pl.DataFrame, objective: str = "et") -> Figure:
    """What plans cost as measured (log) against what the objective gains, a line for each strategy.

    The cost is KL (nats a token) where that bounds plans, else the loss MSE (nats²). For `et` it is
    drawn against time (ms): TTFT, or that of whole answers, as measured and scaled to the speed of
    timing (drift.py), or as predicted where no plan was timed; base's is a line. For the others,
    against the predicted gain. `results` is `results_table`'s.
    """
    figure, (axes,) = new_figure(4.8, 3.7)
    _draw_frontier(axes, results, objective)
    return figure


def _draw_frontier(axes: Axes, results: pl.DataFrame, objective: str) -> None:
    rows = results.filter(pl.col("measured_loss_mse") > 0, objective=objective)
    unit = OBJECTIVES[objective]
    timed = rows["measured_ttft_s"].is_not_null().any()
    time = "carried_time_s" if timed else "predicted_time_s"
    x = pl.col(time if objective == "et" else "predicted_gain") * unit.scale
    rows = rows.with_columns(x=x).drop_nulls("x").sort("tau")
    cost, label = _cost(rows)
    rows = rows.with_columns(y=pl.col(cost))
    with_program = rows["strategy"].str.starts_with("ip_").any()
    for strategy in in_order(rows["strategy"]):
        of = rows.filter(strategy=strategy)
        axes.plot(of["x"], of["y"], **look(strategy), label=legend_name(strategy))
        if strategy.startswith("ip_") or (not with_program and strategy in STRATEGIES):
            _mark_ends(axes, of, objective)
    base = rows.select(pl.coalesce("solved_base_time_s", "base_time_s")).to_series().drop_nulls()
    if objective == "et" and base.len():
        axes.axvline(
            float(base.median() or 0) * unit.scale,  # type: ignore[arg-type]
            color=INK,
            linewidth=1,
            linestyle=(0, (1, 2)),
            label="base model",
        )
    what = f"{name_of_time(rows)}, {'measured' if timed else 'predicted'} (ms)"
    saved = f"{sentence(unit.saved)}, predicted ({unit.unit})"
    axes.set_xlabel(what if objective == "et" else saved)
    axes.set_ylabel(label)
    axes.margins(0.12)
    log_axis(axes, "y")
    legend(axes)


def _cost(rows: pl.DataFrame) -> tuple[str, str]:
    """What plans cost, its column and its axis: KL where it bounds some and was measured of all."""
    if rows["kl_bound"].is_not_null().any() and (rows["measured_kl"] > 0).all():
        return "measured_kl", "KL from base, measured (nats a token)"
    return "measured_loss_mse", "Loss MSE, measured (nats²)"


def _mark_ends(axes: Axes, of: pl.DataFrame, objective: str) -> None:
    """The bound at both ends of a line; the lower one away from others' lines, which gain less."""
    low = (-6, -11, "right") if objective == "et" else (6, -11, "left")
    for i, (right, up, side) in {0: low, of.height - 1: (6, 6, "left")}.items():
        axes.annotate(
            bound_of(of.row(i, named=True)).replace("= ", ""),
            (of["x"][i], of["y"][i]),
            (right, up),
            textcoords="offset points",
            ha=side,
            color=INK,
            fontsize=SMALL,
        )


class Compared(NamedTuple):
    """What is predicted and measured: its columns, its name, its unit and the factor to that."""

    predicted: str
    measured: str
    name: str
    unit: str
    scale: float

    def both(self, plans: pl.DataFrame) -> pl.DataFrame:
        """The plans that have both; on a logarithmic axis, above zero."""
        rows = plans.drop_nulls([self.predicted, self.measured])
        above = (pl.col(self.predicted) > 0) & (pl.col(self.measured) > 0)
        return rows.filter(above) if self.logarithmic else rows

    @property
    def logarithmic(self) -> bool:
        """Whether it runs over decades."""
        return self.unit != "ms"


# times are at the speed of timing (drift.py)
COMPARED: dict[Quantity, Compared] = {
    "loss": Compared("predicted_loss_mse", "measured_loss_mse", "Loss MSE", "nats²", 1.0),
    "kl": Compared("predicted_kl", "measured_kl", "KL divergence", "nats per token", 1.0),
    "ttft": Compared("predicted_ttft_s", "carried_ttft_s", "TTFT", "ms", 1e3),
    "gain": Compared("predicted_gain", "carried_gain_s", "Time gain", "ms", 1e3),
}


def predicted_against_measured(plans: pl.DataFrame, what: Quantity) -> Figure:
    """Measured against predicted, a mark for each plan, with the diagonal.

    Loss MSE and KL are log–log, with dotted lines at half and twice the prediction; a predicted KL
    has its 95 % interval. `plans` is `plan_results`'s or `results_table`'s.
    """
    of = COMPARED[what]
    figure, (axes,) = new_figure(4.8, 4.2)
    rows = of.both(plans)
    for strategy in in_order(rows["strategy"]):
        own = rows.filter(strategy=strategy)
        x, y = own[of.predicted] * of.scale, own[of.measured] * of.scale
        style = look(strategy) | {"linestyle": "none", "markerfacecolor": "none"}
        if strategy in ("ip_tt", "ip_m"):
            style["marker"] = "D" if strategy == "ip_tt" else "v"
        axes.plot(x, y, **style, label=legend_name(strategy))
        if what == "kl":
            half = own["predicted_kl_error"].fill_null(0.0).clip(upper_bound=0.95 * x)
            axes.errorbar(x, y, xerr=half, fmt="none", ecolor=style["color"], elinewidth=0.7)
    if not rows.is_empty():
        both = pl.concat([rows[of.predicted], rows[of.measured]]) * of.scale
        _draw_diagonal(axes, both, of.logarithmic)
    axes.set_xlabel(f"{of.name}, predicted ({of.unit})")
    axes.set_ylabel(f"{of.name}, measured ({of.unit})")
    if of.logarithmic:
        log_axis(axes, "x")
        log_axis(axes, "y")
    legend(axes)
    return figure


def _draw_diagonal(axes: Axes, both: pl.Series, logarithmic: bool) -> None:
    low, high = float(both.min() or 0), float(both.max() or 1)  # type: ignore[arg-type]
    pad = 0.15 * (high - low) or 0.01 * high
    ends = (low * 0.6, high * 1.6) if logarithmic else (low - pad, high + pad)
    axes.plot(ends, ends, color=INK, linewidth=1, label="equal")
    dotted: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": (0, (1, 2))}
    for factor, label in ((0.5, "_"), (2.0, "half, twice")) if logarithmic else ():
        axes.plot(ends, [e * factor for e in ends], **dotted, label=label)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.yaxis.set_major_locator(MaxNLocator(6))  # as on the x axis


SECTIONS = ("frontier", "beside", "map", "predicted", "groups", "accuracy", "calibration")


def report_figures(
    tables: Tables, base: str, calibration: Calibration | None, others: Beside | None = None
) -> dict[str, Pictures]:
    """The report's pictures as inline SVG, by section; a section without data has none."""
    results, plans = results_table(tables), plan_results(tables)
    groups, chosen = table_of(tables, "groups"), table_of(tables, "plans")
    found: dict[str, Pictures] = {section: [] for section in SECTIONS}

    def add(section: str, caption: str, figure: Figure) -> None:
        prefix = f"f{sum(map(len, found.values()))}-"
        found[section].append((caption, to_svg(figure, prefix, caption)))

    bounds = {row["tau"]: bound_of(row) for row in results.iter_rows(named=True)}
    measured = results.filter(pl.col("measured_loss_mse") > 0)
    for objective in (o for o in OBJECTIVES if o in measured["objective"]):
        caption = f"Loss against {OBJECTIVES[objective].name}"
        add("frontier", caption, frontier(results, objective))
    if others:
        from mpq.report.beside_figure import beside_others  # which solves anew, and loads torch

        caption = "KL divergence from base against size, this run's plans and other tools'"
        add("beside", caption, beside_others(others))
    for strategy in (s for s in STRATEGIES if s.startswith("ip_") and s in chosen["strategy"]):
        caption = f"{strategy}: the format of each op"
        add("map", caption, format_map(chosen, groups, strategy, base, bounds))
    names: dict[Quantity, str] = {
        "loss": "Loss MSE",
        "kl": "KL divergence from base",
        "ttft": "Time to first token",
    }
    for what, name in names.items():
        if COMPARED[what].both(plans).height:
            figure = predicted_against_measured(plans, what)
            add("predicted", f"{name}, predicted and measured", figure)
    if not groups.is_empty():
        add("groups", "The groups of one layer", layer_groups(groups))
    for caption, figure in _on_tasks(tables, results):
        add("accuracy", caption, figure)
    if calibration:
        add("calibration", "How much calibration is enough", enough_calibration(calibration))
    return found


def _on_tasks(tables: Tables, results: pl.DataFrame) -> list[tuple[str, Figure]]:
    """What plans cost on tasks, of the objectives whose plans were evaluated on some."""
    rows = differences(tables)
    if rows.is_empty():
        return []
    scores = by_tau(pl.concat([averages(rows), rows]))
    drawn = []
    for objective in OBJECTIVES:
        of = scores.filter(objective=objective, task=AVERAGE)
        if of.height and not no_x(results, objective):
            caption = f"Accuracy, average of the tasks, against {OBJECTIVES[objective].name}"
            drawn.append((caption, accuracy_against(scores, results, objective)))
    each = scores.filter(pl.col("task") != AVERAGE, objective="et")
    if each.height and not no_x(results, "et"):
        drawn.append(("Each task against time to first token", accuracy_per_task(each, results)))
    return drawn


def frontier_png(tables: Tables) -> bytes:
    """The frontiers of all objectives side by side as a PNG on white.

    It says so where nothing was measured.
    """
    results = results_table(tables)
    measured = results.filter(pl.col("measured_loss_mse") > 0)["objective"]
    there = [o for o in OBJECTIVES if o in measured]
    figure = Figure(figsize=(4.8 * max(1, len(there)), 3.7), layout="constrained")
    for i, objective in enumerate(there):
        axes = figure.add_subplot(1, len(there), i + 1)
        dress(axes)
        _draw_frontier(axes, results, objective)
        above = -(-len(axes.get_legend_handles_labels()[1]) // 3)  # lines of the legend
        axes.set_title(sentence(OBJECTIVES[objective].name), fontsize=10, pad=10 + 13 * above)
    if not there:
        figure.text(0.5, 0.5, "No plan was evaluated", ha="center", va="center")
    return to_png(figure)
