"""Maps of a model: which format each op takes, and which ops of a layer are decided together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, PathPatch
from matplotlib.path import Path

from mpq.report.style import (
    FORMAT_COLOURS,
    FORMAT_HATCHES,
    INK,
    ORANGE,
    PINK,
    RULE,
    SKY,
    SMALL,
    dress,
    figure_legend,
    new_figure,
)

_COLUMNS = 128  # layers that are drawn: more are too much for a page, and for an eye
_KINDS = {
    "linear": ("linear", SKY),
    "experts": ("experts", PINK),
    "bgemm": ("BGEMM", ORANGE),
    "other": ("in base", RULE),
}


def place_of(op: str) -> tuple[int | None, str]:
    """The layer that an op's name tells (its first number), and its role in there:
    `model.layers.3.mlp.up_proj` is `mlp.up_proj` of layer 3."""
    found = re.search(r"(?:^|\.)(\d+)\.", op)
    return (int(found[1]), op[found.end() :]) if found else (None, op)


def _short(roles: Sequence[str]) -> list[str]:
    """The last part of each role's name where that tells it from the others, else the whole."""
    last = [role.rpartition(".")[2] for role in roles]
    pairs = zip(roles, last, strict=True)
    return [short if last.count(short) == 1 else role for role, short in pairs]


def format_map(
    plans: pl.DataFrame,
    groups: pl.DataFrame,
    strategy: str,
    base: str,
    bounds: Mapping[float, str] = MappingProxyType({}),
) -> Figure:
    """Which format each op takes under a strategy, a panel for each τ.

    `bounds` may have a τ's bound in words. `plans` and `groups` are the tables so called; ops in
    `base` are pale, ops that the plan does not decide left out.
    """
    rows = plans.filter(strategy=strategy)
    panels = []
    for tau in sorted(rows["tau"].unique()):
        formats = dict(rows.filter(tau=tau).select("op", "format").iter_rows())
        panels.append((bounds.get(tau, f"τ = {tau:g}"), formats))
    return draw_formats([[panel] for panel in panels], groups, base)


def draw_formats(
    panels: Sequence[Sequence[tuple[str, dict[str, str]]]], groups: pl.DataFrame, base: str
) -> Figure:
    """Maps of ops to formats as rows of panels, each with its title.

    In a panel each role in a layer has a row, and each layer a column: of more than _COLUMNS layers
    every second one, every third, … Panels too wide to stand side by side stand below each other.
    """
    order = dict(groups.select("op", "order").iter_rows())
    found = dict.fromkeys(op for line in panels for _, of in line for op in of)
    places = {op: place_of(op) for op in sorted(found, key=lambda op: order.get(op, len(order)))}
    deepest = max((layer for layer, _ in places.values() if layer is not None), default=-1) + 1
    every = math.ceil(deepest / _COLUMNS) or 1
    places = {
        op: (layer if layer is None else layer // every, role)
        for op, (layer, role) in places.items()
        if layer is None or layer % every == 0
    }
    layers = math.ceil(deepest / every)
    outside = any(layer is None for layer, _ in places.values())
    # in the model's order, those outside the layers last
    by_place = sorted(places.values(), key=lambda place: place[0] is None)
    roles = list(dict.fromkeys(role for _, role in by_place))
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
            step = max(1, math.ceil(layers / (16 if across == 1 else 8)))
            shown, last = range(0, layers, step), down == len(panels) - 1
            axes.set_xticks(
                [*(i + 0.5 for i in shown), *([layers + 0.5] if outside else [])],
                [*(str(i * every) for i in shown), *(["–"] if outside else [])] if last else [],
            )
    drawn = f"; one of {every} is drawn" if every > 1 else ""
    apart = "; –: outside the layers" if outside else ""
    figure.supxlabel(f"Layer (number{drawn}{apart})", fontsize=9.5, color=INK)
    lowered = {f for line in panels for _, of in line for f in of.values()}
    used = sorted(lowered, key=lambda f: (f != base, f))
    handles = {f"{f} (base)" if f == base else f: Patch(**_look(f, base)) for f in used}
    if handles:
        figure_legend(figure, handles, "outside upper center", 4)
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
            if f == name and op in places
        ]
        if cells:
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
    """The groups of one layer in the model's middle as boxes, in execution order.

    What is in one box is decided together. `groups` is the table so called. A model without
    numbered layers is drawn whole, up to eight groups.
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
    written: dict[str, Any] = {"ha": "center", "fontsize": SMALL}
    for i, (group, of) in enumerate(shown):
        top = (tallest + of.height) / 2
        rounded = "round,pad=0,rounding_size=0.06"
        corner = (i + 0.08, top - of.height)
        frame: dict[str, Any] = {"edgecolor": INK, "linewidth": 1.2}
        axes.add_patch(FancyBboxPatch(corner, 0.84, of.height, rounded, fill=False, **frame))
        axes.text(i + 0.5, top + 0.12, f"group {group}", va="bottom", color=INK, **written)
        for j, (op, kind) in enumerate(of.select("op", "kind").iter_rows()):
            y = top - j - 0.5
            look: dict[str, Any] = {"facecolor": _KINDS[kind][1], "linewidth": 0}
            rounded = "round,pad=0,rounding_size=0.04"
            axes.add_patch(FancyBboxPatch((i + 0.13, y - 0.36), 0.74, 0.72, rounded, **look))
            name = op.rpartition(".")[2]
            axes.text(i + 0.5, y, name, va="center", color="#000000", **written)
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
    there = {kind for _, of in shown for kind in of["kind"]}
    handles = {label: Patch(facecolor=c) for k, (label, c) in _KINDS.items() if k in there}
    figure_legend(figure, handles, "outside lower center", len(handles))
    return figure
