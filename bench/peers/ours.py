"""mpq: KL sensitivity of every op in every format, from one pass; the program for each target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from allocation import Costs, allocated
from task import Plan, Task, answer

from mpq.loss.sensitivity import measure_sensitivity
from mpq.models.blocks import Blocks
from mpq.models.loading import load_model
from mpq.program.costs import Costs as Predicted

BASE, BATCH = "fp32", 2


def score(task: Task) -> Costs:
    model = load_model(Path(task.checkpoint), BASE)
    sensitivity, _ = measure_sensitivity(
        model,
        [(op, "linear") for op in task.ops],
        Blocks(np.load(task.tokens)),
        formats=task.formats,
        base=BASE,
        batch=BATCH,
        measures=("kl",),
    )
    # where the loss was not measured, the costs are of KL alone
    predicted = Predicted(sensitivity.with_columns(loss_mse=0.0), "actual", BASE)
    return {(op, f): predicted.kl({op: f}) for op in task.ops for f in task.formats}


def solve(task: Task, costs: Costs, target: float) -> Plan:
    return allocated(task, costs, target)


if __name__ == "__main__":
    answer(score, solve)
