"""How the report's pictures look, and the way of a matplotlib Figure into HTML and SVG.

No pyplot and no global state of it, so figures can be drawn on any thread. A strategy or format
has a colour (Okabe and Ito's, which colour-blind readers tell apart) and a marker or label as
well. INK and RULE are stand-ins: in HTML and SVG they become the page's own text and line colour,
and blue a lighter one on dark, so that one picture serves light and dark pages.
"""

from __future__ import annotations

import io
import math
import re
import threading
from collections.abc import Mapping
from typing import Any, Literal

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mpq.program.plan import is_uniform
from mpq.report.results import STRATEGIES

INK, RULE = "#010203", "#d3d3d5"
BLUE, RED, GREEN, ORANGE, SKY, PINK, YELLOW = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#e69f00",
    "#56b4e9",
    "#cc79a7",
    "#f0e442",
)
_LOOKS = dict.fromkeys(STRATEGIES, (BLUE, "o", "-")) | {
    "random": (RED, "s", "--"),
    "prefix": (GREEN, "^", ":"),
}
FORMAT_COLOURS = {
    "fp32": YELLOW,
    "fp16": ORANGE,
    "bf16": SKY,
    "fp8_e4m3": RED,
    "fp8_e5m2": PINK,
    "int8": GREEN,
}
# told apart in grey print as well
FORMAT_HATCHES = {"fp8_e4m3": "//", "fp8_e5m2": "\\\\", "int8": "..", "fp16": "--"}
SMALL = 8.5
Outside = Literal["outside upper center", "outside upper left", "outside lower center"]
_render = threading.Lock()


def in_order(strategies: pl.Series) -> list[str]:
    """The different strategies, integer programs first, uniform plans last."""
    place = {name: i for i, name in enumerate(STRATEGIES)}
    return sorted(strategies.unique(), key=lambda s: (place.get(s, len(place)), s))


def look(strategy: str) -> dict[str, Any]:
    """A strategy's colour, marker and line, as matplotlib's plot takes them.

    Uniform plans are points in their format's colour; those that spare the head are hollow.
    """
    common = {"markersize": 6, "linewidth": 1.5, "zorder": 3 if strategy.startswith("ip_") else 2}
    if is_uniform(strategy):
        name = strategy.removeprefix("uniform_").removesuffix("_but_head")
        style = {"color": FORMAT_COLOURS.get(name, INK), "marker": "D", "linestyle": "none"}
        hollow = {"markerfacecolor": "none"} if strategy.endswith("_but_head") else {}
        return common | style | hollow
    colour, marker, line = _LOOKS.get(strategy, (INK, "D", "-."))
    return common | {"color": colour, "marker": marker, "linestyle": line}


def legend_name(strategy: str) -> str:
    """A strategy's name in legends: `all int8` for uniform_int8, `int8 but head` without it."""
    name = strategy.removeprefix("uniform_")
    if not is_uniform(strategy):
        return strategy
    spared = name.removesuffix("_but_head")
    return f"{spared} but head" if spared != name else f"all {name}"


def to_svg(figure: Figure, prefix: str, label: str = "") -> str:
    """The figure as SVG to stand inside HTML.

    Its ids begin with `prefix`, its colours follow the page, it is no wider than it was drawn.
    """
    out = io.StringIO()
    # text stays text: small, and read by screen readers; the setting is global, hence the lock
    with _render, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mpq"}):
        figure.savefig(
            out,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|\sxmlns(:xlink)?=\"[^\"]*\"",
        "",
        svg,
        flags=re.S,
    )
    width = float(re.search(r'width="([\d.]+)pt"', svg)[1])  # type: ignore[index]
    wide = 'class="wide" ' if width > 500 else ""
    label = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    size = f"max-width:{width * 4 / 3:.0f}px;min-width:{width * 0.7:.0f}px"
    head = rf'<svg \1 role="img" aria-label="{label}" {wide}style="{size}">'
    svg = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", head, svg, count=1)
    ids = dict.fromkeys(re.findall(r'\bid="([^"]+)"', svg))
    names = {old: f"{prefix}{i}" for i, old in enumerate(ids)}
    svg = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{names[m[1]]}"', svg)
    svg = re.sub(
        r"(xlink:href=\"|url\()#([^\")]+)",
        lambda m: f"{m[1].removeprefix('xlink:')}#{names.get(m[2], m[2])}",
        svg,
    )
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return (
        svg.replace(INK, "currentColor").replace(RULE, "var(--rule)").replace(BLUE, "var(--blue)")
    )


def standalone_svg(svg: str) -> str:
    """`to_svg`'s markup as a file of its own, with its namespace and both pages' colours."""
    style = (
        "svg { --rule: #d5d9de; --blue: #0072b2; color: #1b1f24; background: #fff; "
        "stroke-linejoin: round; font-family: sans-serif } "
        "@media (prefers-color-scheme: dark) { svg { --rule: #3a424c; --blue: #3f9fe0; "
        "color: #e4e7eb; background: #14171b } }"
    )
    found = re.match(r'<svg viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    size = f' width="{found[1]}pt" height="{found[2]}pt"' if found else ""
    head, _, rest = svg.partition(">")
    head = re.sub(r' style="[^"]*"', "", head).replace(
        "<svg", f'<svg xmlns="http://www.w3.org/2000/svg"{size}', 1
    )
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}><style>{style}</style>{rest}'


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `width` × `height` inches and its axes, below each other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    every = [figure.add_subplot(panels, 1, i + 1) for i in range(panels)]
    for axes in every:
        dress(axes)
    return figure, every


def dress(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.grid(True, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=SMALL, which="both")
    axes.spines[:].set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        axis.label.set_fontsize(9.5)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure on white."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, facecolor="white")
    return out.getvalue()


def figure_legend(figure: Figure, handles: Mapping[str, Any], where: Outside, columns: int) -> None:
    """One legend outside of all panels; `handles` by their labels."""
    figure.legend(
        list(handles.values()),
        list(handles),
        loc=where,
        ncols=max(1, columns),
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
    )


def handles_of(figure: Figure) -> dict[str, Any]:
    """What the panels of a figure draw, by label, each once."""
    found = dict[str, Any]()
    for axes in figure.axes:
        lines, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, lines, strict=True))
    return found


def legend(axes: Axes) -> None:
    """The legend above the axes: inside them it would lie on marks or error bars."""
    entries = len(axes.get_legend_handles_labels()[1])
    if entries:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=4 if entries <= 4 else 3,
            frameon=False,
            fontsize=SMALL,
            labelcolor=INK,
            borderaxespad=0.2,
            columnspacing=1.4,
            handlelength=2.4,
        )


def log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis with labels such as 2·10⁻⁶: at powers of ten, or where it spans less than
    two decades at 1, 2 and 5 of each."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    narrow = low > 0 and math.log10(high / low) < 2
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: power(v)))


def power(value: float) -> str:
    if value <= 0:
        return "0"
    exponent = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10**exponent)
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if digit == 1 else f"{digit}·{power}"
