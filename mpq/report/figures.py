"""The report's pictures, each a function from a table to a matplotlib Figure, and their way into HTML and PNG.

No pyplot and no global state of it, so figures can be drawn on any thread. A strategy or format has a colour (Okabe and
Ito's, which colour-blind readers tell apart) and a marker or label as well. INK and RULE are stand-ins: in HTML they
become the page's own text and line colour (and blue a lighter one on dark), so that one picture serves light and dark pages.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from mpq.report.drawing import (
    FORMAT_COLOURS,
    FORMAT_HATCHES,
    INK,
    LOOKS,
    ORANGE,
    RULE,
    SKY,
    SMALL,
    dress,
    legend,
    log_axis,
    new_figure,
    sentence,
    to_svg,
)
from mpq.report.results import OBJECTIVES, STRATEGIES, Tables, plan_results, results_table, table_of

AT_ONE_SPEED = "; times at the machine's speed while configurations were timed"


def frontier(results: pl.DataFrame, objective: str = "et") -> Figure:
    """Measured loss MSE (nats², log) against what the objective gains, a line for each strategy, τ at its ends.

    `et`: against the measured TTFT in ms, at the speed that the machine had while configurations were timed (drift.py; predicted where no
    plan was timed), the base TTFT as a line. Others: against the predicted gain. `results` is `results_table`'s.
    """
    figure, (axes,) = new_figure(4.8, 3.7)
    _draw_frontier(axes, results, objective)
    return figure


def _draw_frontier(axes: Axes, results: pl.DataFrame, objective: str) -> None:
    rows = results.filter((pl.col("objective") == objective) & (pl.col("measured_loss_mse") > 0))
    unit = OBJECTIVES[objective]
    timed = rows["measured_ttft_s"].is_not_null().any()
    x = (
        pl.col("carried_ttft_s" if timed else "predicted_ttft_s")
        if objective == "et"
        else pl.col("predicted_gain")
    ) * unit.scale
    rows = rows.with_columns(x.alias("x")).drop_nulls("x").sort("tau")
    for strategy in rows["strategy"].unique(maintain_order=True).sort():
        of = rows.filter(pl.col("strategy") == strategy)
        colour, marker, line = LOOKS.get(strategy, (INK, "D", "-."))
        xs, ys = of["x"].to_list(), of["measured_loss_mse"].to_list()
        top = 3 if strategy.startswith("ip_") else 2
        axes.plot(
            xs,
            ys,
            color=colour,
            marker=marker,
            linestyle=line,
            label=strategy,
            markersize=6,
            linewidth=1.5,
            zorder=top,
        )
        # every strategy ends near the others, so only the integer program's ends are labelled where there is one
        if strategy.startswith("ip_") or not rows["strategy"].str.starts_with("ip_").any():
            low = (
                (-6, -11, "right") if objective == "et" else (6, -11, "left")
            )  # away from the others, which gain less
            for i, (right, up, side) in {0: low, len(xs) - 1: (6, 6, "left")}.items():
                label, at = f"τ {of['tau'][i]:g}", (xs[i], ys[i])
                axes.annotate(
                    label,
                    at,
                    (right, up),
                    textcoords="offset points",
                    ha=side,
                    color=INK,
                    fontsize=SMALL,
                )
    if (
        objective == "et"
        and (
            base := rows.select(pl.coalesce("solved_base_ttft_s", "base_ttft_s"))
            .to_series()
            .drop_nulls()
        ).len()
    ):
        axes.axvline(
            float(base.median() or 0) * unit.scale,  # type: ignore[arg-type]
            color=INK,
            linewidth=1,
            linestyle=(0, (1, 2)),
            label="base model",
        )
    axes.set_xlabel(
        f"TTFT, {'measured' if timed else 'predicted'} (ms)"
        if objective == "et"
        else f"{sentence(unit.saved)}, predicted ({unit.unit})"
    )
    axes.set_ylabel("Loss MSE, measured (nats²)")
    axes.margins(0.12)
    log_axis(axes, "y")
    legend(axes)


def predicted_against_measured(
    plans: pl.DataFrame, what: Literal["loss", "ttft", "gain"]
) -> Figure:
    """Measured against predicted loss MSE (nats², log–log), TTFT (ms) or time gain (ms), a mark for each plan, with the diagonal.

    `plans` is `plan_results`'s or `results_table`'s; measured times are at the speed of timing (drift.py). On the loss, the dotted lines are half and twice the prediction.
    """
    figure, (axes,) = new_figure(4.8, 4.2)
    predicted, measured = {
        "loss": ("predicted_loss_mse", "measured_loss_mse"),
        "ttft": ("predicted_ttft_s", "carried_ttft_s"),
        "gain": ("predicted_gain", "carried_gain_s"),
    }[what]
    unit, scale = ("nats²", 1.0) if what == "loss" else ("ms", 1e3)
    rows = plans.drop_nulls([predicted, measured])
    if what != "gain":  # which may be below zero
        rows = rows.filter((pl.col(predicted) > 0) & (pl.col(measured) > 0))
    for strategy in sorted(
        rows["strategy"].unique().sort(),
        key=lambda s: STRATEGIES.index(s) if s in STRATEGIES else 99,
    ):
        of, (colour, marker, _) = (
            rows.filter(pl.col("strategy") == strategy),
            LOOKS.get(strategy, (INK, "D", "-.")),
        )
        marker = {"ip_tt": "D", "ip_m": "v"}.get(strategy, marker)
        x, y = (of[side] * scale for side in (predicted, measured))
        axes.plot(
            x,
            y,
            linestyle="none",
            marker=marker,
            markersize=6,
            markerfacecolor="none",
            color=colour,
            label=strategy,
        )
    if not rows.is_empty():
        both = pl.concat([rows[predicted], rows[measured]]) * scale
        low, high = float(both.min() or 0), float(both.max() or 1)  # type: ignore[arg-type]
        pad = 0.15 * (high - low) or 0.01 * high
        ends = (low * 0.6, high * 1.6) if what == "loss" else (low - pad, high + pad)
        axes.plot(ends, ends, color=INK, linewidth=1, label="equal")
        for factor in (0.5, 2.0) if what == "loss" else ():
            axes.plot(
                ends,
                [e * factor for e in ends],
                color=INK,
                linewidth=0.8,
                linestyle=(0, (1, 2)),
                label="half, twice" if factor > 1 else "_",
            )
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        axes.yaxis.set_major_locator(MaxNLocator(6))  # as on the x axis
    name = {"loss": "Loss MSE", "ttft": "TTFT", "gain": "Time gain"}[what]
    axes.set_xlabel(f"{name}, predicted ({unit})")
    axes.set_ylabel(f"{name}, measured ({unit})")
    if what == "loss":
        log_axis(axes, "x")
        log_axis(axes, "y")
    legend(axes)
    return figure


def place_of(op: str) -> tuple[int | None, str]:
    """The layer that an op's name tells (its first number), and its role in there: ('model.layers.3.mlp.up_proj') → 3, 'mlp.up_proj'."""
    found = re.search(r"(?:^|\.)(\d+)\.", op)
    return (int(found[1]), op[found.end() :]) if found else (None, op)


def _short(roles: Sequence[str]) -> list[str]:
    last = [r.rpartition(".")[2] for r in roles]
    return [
        short if last.count(short) == 1 else role for role, short in zip(roles, last, strict=True)
    ]


def format_map(plans: pl.DataFrame, groups: pl.DataFrame, strategy: str, base: str) -> Figure:
    """Which format each op takes: a panel for each τ, a row for each role in a layer, a column for each layer.

    `plans` and `groups` are the tables so called; ops in `base` are pale, ops that the plan does not decide left out.
    """
    rows = plans.filter(pl.col("strategy") == strategy)
    panels = [
        (f"τ = {tau:g}", dict(rows.filter(pl.col("tau") == tau).select("op", "format").iter_rows()))
        for tau in sorted(rows["tau"].unique())
    ]
    return draw_formats([[panel] for panel in panels], groups, base)


def draw_formats(
    panels: Sequence[Sequence[tuple[str, dict[str, str]]]], groups: pl.DataFrame, base: str
) -> Figure:
    """Maps of ops to formats as rows of panels, each with its title: a row for each role in a layer, a column for each layer.

    Panels that are too wide to stand side by side stand below each other.
    """
    order = dict(groups.select("op", "order").iter_rows())
    found = dict.fromkeys(op for line in panels for _, of in line for op in of)
    ops = sorted(found, key=lambda op: order.get(op, len(order)))
    places = {op: place_of(op) for op in ops}
    layers = max((layer for layer, _ in places.values() if layer is not None), default=-1) + 1
    outside = any(layer is None for layer, _ in places.values())
    roles = list(
        dict.fromkeys(
            sorted(
                (role for _, role in places.values()),
                key=lambda r: any(places[o] == (None, r) for o in ops),
            )
        )
    )
    columns = layers + outside
    across = max((len(line) for line in panels), default=1)
    width = max(4.8 if across == 1 else 2.5, 0.09 * columns + 1.2)
    if across > 1 and width * across > 11:
        panels, across = [[panel] for line in panels for panel in line], 1
    figure = Figure(
        figsize=(width * across, max(1, len(panels)) * (0.15 * len(roles) + 0.28) + 0.75),
        layout="constrained",
    )
    for down, line in enumerate(panels):
        for right, (title, of) in enumerate(line):
            axes = figure.add_subplot(len(panels), across, down * across + right + 1)
            dress(axes)
            _draw_map(axes, of, places, roles, layers, base)
            axes.set_title(title, fontsize=SMALL, loc="left", color=INK, pad=2)
            axes.set_yticks(
                [i + 0.5 for i in range(len(roles))],
                _short(roles) if right == 0 else [],
                fontsize=7,
            )
            axes.set_xlim(0, columns)
            shown, last = (
                [*range(0, layers, max(1, math.ceil(layers / (16 if across == 1 else 8))))],
                down == len(panels) - 1,
            )
            axes.set_xticks(
                [*(i + 0.5 for i in shown), *([layers + 0.5] if outside else [])],
                [*map(str, shown), *(["–"] if outside else [])] if last else [],
            )
    figure.supxlabel(
        "Layer (number" + ("; –: outside the layers)" if outside else ")"), fontsize=9.5, color=INK
    )
    used = sorted(
        {f for line in panels for _, of in line for f in of.values()}, key=lambda f: (f != base, f)
    )
    handles = [Patch(**_look(f, base), label=f"{f} (base)" if f == base else f) for f in used]
    if handles:
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=4,
            frameon=False,
            fontsize=SMALL,
            labelcolor=INK,
        )
    return figure


def _draw_map(
    axes: Axes,
    of: dict[str, str],
    places: dict[str, tuple[int | None, str]],
    roles: Sequence[str],
    layers: int,
    base: str,
) -> None:
    for name in sorted(set(of.values())):
        cells = [
            _cell(places[op][0], roles.index(places[op][1]), layers)
            for op, f in of.items()
            if f == name
        ]
        axes.add_patch(PathPatch(Path.make_compound_path(*cells), **_look(name, base)))
    axes.set_ylim(len(roles), 0)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _look(name: str, base: str) -> dict[str, Any]:
    """A format's colour and hatching; the base format is pale."""
    if name == base:
        return {"facecolor": RULE, "linewidth": 0}
    hatch = FORMAT_HATCHES.get(name)
    return {
        "facecolor": FORMAT_COLOURS.get(name, INK),
        "linewidth": 0,
        "edgecolor": "#ffffff",
        "hatch": hatch,
        "hatch_linewidth": 0.7,
    }


def _cell(layer: int | None, row: int, layers: int) -> Path:
    x, gap = layers if layer is None else layer, 0.06
    left, right, top, bottom = x + gap, x + 1 - gap, row + gap, row + 1 - gap
    return Path(
        [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], closed=True
    )


def layer_groups(groups: pl.DataFrame) -> Figure:
    """The groups of one layer in the model's middle as boxes, in execution order: what is in one box is decided together.

    `groups` is the table so called. A model without numbered layers is drawn whole, up to eight groups.
    """
    rows = groups.sort("order")
    numbers = sorted({layer for op in rows["op"] if (layer := place_of(op)[0]) is not None})
    middle = numbers[len(numbers) // 2] if numbers else None
    boxes = {
        group: of
        for (group,), of in rows.group_by(["group"], maintain_order=True)
        if any(place_of(op)[0] == middle for op in of["op"])
    }
    shown = list(boxes.items())[:8]
    tallest = max((of.height for _, of in shown), default=1)
    figure, (axes,) = new_figure(max(4.8, 1.2 * len(shown)), 0.34 * tallest + 0.75)
    for i, (group, of) in enumerate(shown):
        top = (tallest + of.height) / 2
        axes.add_patch(
            FancyBboxPatch(
                (i + 0.08, top - of.height),
                0.84,
                of.height,
                "round,pad=0,rounding_size=0.06",
                fill=False,
                edgecolor=INK,
                linewidth=1.2,
            )
        )
        axes.text(
            i + 0.5,
            top + 0.12,
            f"group {group}",
            ha="center",
            va="bottom",
            fontsize=SMALL,
            color=INK,
        )
        for j, (op, kind) in enumerate(of.select("op", "kind").iter_rows()):
            y, colour = top - j - 0.5, SKY if kind == "linear" else ORANGE
            axes.add_patch(
                FancyBboxPatch(
                    (i + 0.13, y - 0.36),
                    0.74,
                    0.72,
                    "round,pad=0,rounding_size=0.04",
                    facecolor=colour,
                    linewidth=0,
                )
            )
            axes.text(
                i + 0.5,
                y,
                op.rpartition(".")[2],
                ha="center",
                va="center",
                fontsize=SMALL,
                color="#000000",
            )
        if i + 1 < len(shown):
            axes.annotate(
                "",
                (i + 1.08, tallest / 2),
                (i + 0.92, tallest / 2),
                arrowprops={"arrowstyle": "->", "color": INK, "shrinkA": 0, "shrinkB": 0},
            )
    axes.set_xlim(0, max(1, len(shown)))
    axes.set_ylim(-0.1, tallest + 0.6)
    axes.axis("off")
    handles = [Patch(facecolor=SKY, label="linear"), Patch(facecolor=ORANGE, label="BGEMM")]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
    )
    return figure


def report_figures(tables: Tables, base: str) -> dict[str, list[tuple[str, str]]]:
    """The report's figures besides the numbered ones, as inline SVG: section → (caption, markup) of each.

    The frontier of each objective, TTFT predicted and measured, the integer programs' formats at every τ.
    """
    results, plans = results_table(tables), table_of(tables, "plans")
    measured = results.filter(pl.col("measured_loss_mse") > 0)
    found: dict[str, list[tuple[str, str]]] = {"frontier": [], "predicted": [], "map": []}

    def add(section: str, caption: str, figure: Figure) -> None:
        prefix = f"f{sum(map(len, found.values()))}-"
        found[section].append((caption, to_svg(figure, prefix, caption)))

    for objective in OBJECTIVES:
        if objective in measured["objective"]:
            speed = AT_ONE_SPEED if objective == "et" else ""
            add(
                "frontier",
                f"Loss MSE against {OBJECTIVES[objective].name} ({objective}){speed}",
                frontier(results, objective),
            )
    if results.drop_nulls(["predicted_ttft_s", "measured_ttft_s"]).height:
        add(
            "predicted",
            f"TTFT, predicted and measured, all plans timed{AT_ONE_SPEED}",
            predicted_against_measured(plan_results(tables), "ttft"),
        )
    for strategy in STRATEGIES:
        if strategy.startswith("ip_") and strategy in plans["strategy"]:
            add(
                "map",
                f"{strategy}: the format of each op",
                format_map(plans, table_of(tables, "groups"), strategy, base),
            )
    return found


def frontier_png(tables: Tables) -> bytes:
    """The frontiers of all objectives side by side as a PNG on white; says so where nothing was measured."""
    results = results_table(tables)
    there = [
        o for o in OBJECTIVES if o in results.filter(pl.col("measured_loss_mse") > 0)["objective"]
    ]
    figure = Figure(figsize=(4.8 * max(1, len(there)), 3.7), layout="constrained")
    for i, objective in enumerate(there):
        axes = figure.add_subplot(1, len(there), i + 1)
        dress(axes)
        axes.set_title(sentence(OBJECTIVES[objective].name), fontsize=10, pad=24)
        _draw_frontier(axes, results, objective)
    if not there:
        figure.text(0.5, 0.5, "No plan was evaluated", ha="center", va="center")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, facecolor="white")
    return out.getvalue()
