"""A HIGGS-like linear allocation (arXiv 2411.17525): a weight's relative squared rounding error × a coefficient of its layer.

The coefficient is measured: Gaussian noise of relative norm NOISE on one weight after another, and the KL divergence that
it makes on the first BLOCKS of the calibration text, over NOISE². What rounding activations costs is left out, as there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from allocation import Costs, allocated
from task import Plan, Task, answer

from mpq.formats.quantize import fake_quantize
from mpq.formats.scheme import get_scheme
from mpq.loss.cross_entropy import log_probabilities
from mpq.models.loading import load_model

NOISE, BLOCKS = 0.1, 4


@torch.inference_mode()
def score(task: Task) -> Costs:
    model = load_model(Path(task.checkpoint), "fp32")
    tokens, draw = torch.from_numpy(np.load(task.tokens)[:BLOCKS]), torch.Generator().manual_seed(0)
    p, costs = log_probabilities(model, tokens), {}
    for op in task.ops:
        weight = model.get_submodule(op).weight
        kept, drawn = weight.clone(), torch.randn(weight.shape, generator=draw)
        weight += drawn * (NOISE * weight.norm() / drawn.norm())
        coefficient = float((p.exp() * (p - log_probabilities(model, tokens))).sum(-1).mean())
        weight.copy_(kept)
        for f in task.formats:
            error = fake_quantize(weight, get_scheme(f).weights, "row") - weight
            costs[op, f] = coefficient / NOISE**2 * float((error.norm() / weight.norm()) ** 2)
    return costs


def solve(task: Task, costs: Costs, target: float) -> Plan:
    return allocated(task, costs, target)


if __name__ == "__main__":
    answer(score, solve)
