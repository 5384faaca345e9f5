"""The frontiers of a comparison: `python bench/peers/picture.py RESULTS/peers.parquet --out docs/peers.png`.

A panel for each checkpoint and case: KL over that of mpq's plan at the same target of bits, a line for each tool. mpq is the
line at 1; lower is better. Plans that are over their target are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mpq.report.style import BLUE, GREEN, INK, ORANGE, PINK, RED, SKY, SMALL, dress

LOOKS = {  # colour, marker, line
    "mpq": (BLUE, "o", "-"),
    "measured": (INK, "x", ":"),
    "modelopt-gradient": (GREEN, "^", "--"),
    "modelopt-kl": (SKY, "v", "--"),
    "auto-round": (ORANGE, "s", "-."),
    "higgs": (PINK, "D", "-."),
    "random": (RED, "+", ":"),
}
COLUMNS, TALLEST = 3, 16.0  # panels a row; ratios above are cut off


def panels(plans: pl.DataFrame) -> Figure:
    """A panel for each checkpoint and case of the plans of compare.py."""
    cells = plans.select("checkpoint", "case").unique(maintain_order=True).rows()
    down = -(-len(cells) // COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 2.6 * down + 0.5), layout="constrained")
    ours = plans.filter(tool="mpq").select("checkpoint", "case", "target", ours="kl")
    rows = plans.filter(~pl.col("over")).join(ours, on=["checkpoint", "case", "target"])
    for i, (checkpoint, case) in enumerate(cells):
        axes = figure.add_subplot(down, COLUMNS, i + 1)
        _draw(axes, rows.filter(checkpoint=checkpoint, case=case))
        axes.set_title(f"{checkpoint}, {case}", fontsize=SMALL + 1, color=INK)
        if not i % COLUMNS:
            axes.set_ylabel("KL over mpq's")
        if i >= len(cells) - COLUMNS:
            axes.set_xlabel("Effective bits of a weight")
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(LOOKS), frameon=False)
    return figure


def _draw(axes: Axes, rows: pl.DataFrame) -> None:
    dress(axes)
    for tool, (color, marker, line) in LOOKS.items():
        of = rows.filter(tool=tool).sort("target")
        look = {"color": color, "marker": marker, "linestyle": line, "markersize": 4}
        axes.plot(of["target"], of["kl"] / of["ours"], linewidth=1.2, label=tool, **look)
    axes.set_yscale("log")
    axes.set_ylim(0.8, TALLEST)
    axes.yaxis.set_major_locator(FixedLocator([1, 2, 4, 8, 16]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("plans", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/peers.png"))
    options = parser.parse_args()
    panels(pl.read_parquet(options.plans)).savefig(options.out, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
