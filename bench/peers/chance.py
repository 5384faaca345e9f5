"""Random: ops in a drawn order, each in a drawn format, until the mean bits a weight are at most the target."""

from __future__ import annotations

import random

from task import BITS, Plan, Task


def drawn(task: Task, target: float, seed: int) -> Plan:
    """One plan. Where all ops are lowered and the bits are still too many, they go to the narrowest format in a drawn order."""
    draw, plan = random.Random(seed), dict.fromkeys(task.ops, "base")
    narrowest = min(task.formats, key=BITS.__getitem__)
    for formats in (task.formats, [narrowest]):
        order = task.decisions()
        draw.shuffle(order)
        for ops in order:
            if task.bits(plan) <= target:
                return plan
            plan.update(dict.fromkeys(ops, draw.choice(formats)))
    return plan
