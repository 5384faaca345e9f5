"""How much calibration is enough, as a picture: the curve that calibration.py tells in numbers."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from mpq.program.stability import ALIKE, KNOWN
from mpq.report.calibration import Calibration
from mpq.report.style import BLUE, INK, RED, SMALL, legend, new_figure


def enough_calibration(found: Calibration) -> Figure:
    """What two calibrations lower alike, and how far a plan's cost is known, over samples (log₂).

    A dashed line says what is enough of each, a vertical one how many samples the run has.
    """
    figure, (axes,) = new_figure(4.8, 3.4)
    samples = [at.samples for at in found.curve]
    lines = (
        ("lowered alike", [at.alike for at in found.curve], ALIKE, BLUE, "o"),
        (f"{found.cost} known to ±", [at.known for at in found.curve], KNOWN, RED, "s"),
    )
    for name, values, limit, color, marker in lines:
        axes.plot(samples, values, color=color, marker=marker, markersize=4, label=name)
        axes.axhline(limit, color=color, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.axvline(found.samples, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.annotate(
        "this run",
        (found.samples, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, -2),
        textcoords="offset points",
        va="top",
        color=INK,
        fontsize=SMALL,
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(samples))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:.0f}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, 1.05 * max(1.0, *(min(at.known, 2.0) for at in found.curve)))
    axes.set_xlabel("Samples of calibration text")
    legend(axes)
    return figure
