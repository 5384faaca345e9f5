"""The frontier of a finished run as a picture: what pareto.py tells in numbers."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from mpq.program.gains import NAMES
from mpq.report.pareto import Pareto
from mpq.report.results import OBJECTIVES, sentence
from mpq.report.style import BLUE, INK, legend, log_axis, new_figure


def picture(pareto: Pareto) -> Figure:
    """Gain against cost, a step for each point: what no plan of at most this cost exceeds."""
    unit = OBJECTIVES[pareto.objective]
    name, of = NAMES[pareto.cost]
    figure, (axes,) = new_figure(6.4, 4.2)
    costs = np.array([point.cost for point in pareto.points])
    saved = np.array([point.gain for point in pareto.points]) * unit.scale
    axes.step(costs, saved, where="post", color=BLUE, linewidth=1)
    axes.plot(costs, saved, ".", color=BLUE, markersize=4, label="Pareto-optimal plans")
    axes.axhline(saved[-1], color=INK, linewidth=0.8, linestyle=(0, (1, 2)), label="everything")
    axes.set_xlabel(f"{name}, predicted ({of})")
    axes.set_ylabel(f"{sentence(unit.saved)}, predicted ({unit.unit})")
    log_axis(axes, "x")
    legend(axes)
    return figure
