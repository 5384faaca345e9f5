"""Other tools' plans beside the run's own, as a picture: what beside.py tells in numbers."""

from __future__ import annotations

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpq.report.beside import COUNTS, Beside
from mpq.report.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PINK,
    RED,
    SKY,
    SMALL,
    dress,
    figure_legend,
    handles_of,
    in_order,
    legend_name,
    log_axis,
    look,
)

COLUMNS = 3  # panels a row
LOOKS = [  # of tools, in the order of the table
    (color, marker)
    for markers in ("^sDv", "*Xph")
    for color, marker in zip((GREEN, ORANGE, PINK, SKY), markers, strict=True)
] + [(RED, "+"), (INK, "x")]


def beside_others(found: Beside) -> Figure:
    """KL (log) against size, a panel for each case.

    A mark is a plan as measured, other tools' joined tool by tool; the run's own frontier is a line,
    as predicted.
    """
    cases = found.others["case"].unique(maintain_order=True).to_list()
    tools = found.others["tool"].unique(maintain_order=True).to_list()
    across = min(COLUMNS, len(cases))
    down = -(-len(cases) // across)
    size = (6.4, 4.2) if len(cases) == 1 else (3.6 * across, 2.9 * down + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    for i, case in enumerate(cases):
        axes = figure.add_subplot(down, across, i + 1)
        dress(axes)
        _draw_own(axes, found)
        _draw_others(axes, found, found.others.filter(case=case), tools)
        axes.set_title(_plain(case), fontsize=SMALL + 1, color=INK)
        log_axis(axes, "y")
        if not i % across:
            axes.set_ylabel("KL from base (nats per token)")
        if i >= len(cases) - across:
            axes.set_xlabel(f"{COUNTS[found.count].name} ({COUNTS[found.count].unit})")
    columns = 2 * across if len(cases) > 1 else 3
    figure_legend(figure, handles_of(figure), "outside upper left", columns)
    return figure


def _draw_own(axes: Axes, found: Beside) -> None:
    scale = COUNTS[found.count].scale
    line = found.frontier.filter(pl.col("kl") > 0)
    axes.step(
        line["size"] * scale,
        line["kl"],
        where="post",
        color=BLUE,
        linewidth=1,
        label="this run's frontier, predicted",
    )
    for strategy in in_order(found.measured["strategy"]):
        of = found.measured.filter(strategy=strategy)
        style = look(strategy) | {"linestyle": "none"}
        label = f"{legend_name(strategy)}, measured"
        axes.plot(of["size"] * scale, of["kl"], **style, label=label)


def _draw_others(axes: Axes, found: Beside, rows: pl.DataFrame, tools: list[str]) -> None:
    for i, tool in enumerate(tools):
        of = rows.filter(pl.col("kl") > 0, tool=tool).sort("size")
        color, marker = LOOKS[i % len(LOOKS)]
        axes.plot(
            of["size"] * COUNTS[found.count].scale,
            of["kl"],
            color=color,
            marker=marker,
            markersize=5,
            markerfacecolor="none",
            linewidth=0.7,
            linestyle=":",
            zorder=3,
            label=_plain(tool),
        )


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar begins no formula, and what begins with _ is not left out of the legend."""
    shown = text.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
