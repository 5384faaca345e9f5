"""The plan of the smallest summed cost whose mean bits a weight are at most a target: mpq's program, for any costs."""

from __future__ import annotations

import numpy as np
import polars as pl
from task import BITS, Plan, Task

from mpq.program.gains import least_cost
from mpq.program.rows import Row

Costs = dict[tuple[str, str], float]  # (op, format) → what lowering it costs; base costs nothing


def allocated(task: Task, costs: Costs, target: float) -> Plan:
    """The plan for one target (mean bits a weight)."""
    rows, bits = [], []
    for group, ops in enumerate(task.decisions()):
        for name in ("base", *task.formats):
            cost = 0.0 if name == "base" else sum(costs[op, name] for op in ops)
            # at least nothing: measured alone, an op's divergence cannot be below it
            rows.append({"group": group, "ops": ops, "configuration": [name], "kl": max(0.0, cost)})
            bits.append(BITS[name] * sum(task.ops[op] for op in ops))
    gains = pl.DataFrame(rows).with_columns(gain=pl.lit(0.0), loss_mse=pl.col("kl"))
    limit = target * sum(task.ops.values())
    chosen, _ = least_cost(gains, [Row("bits", np.array(bits), limit)])
    return {
        op: configuration[0]
        for ops, configuration in chosen.select("ops", "configuration").iter_rows()
        for op in ops
    }
