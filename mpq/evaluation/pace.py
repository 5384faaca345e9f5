"""How fast a model reads text: the measure by which the cost of a sweep is told before it starts."""

from __future__ import annotations

import time
from collections.abc import Mapping

import polars as pl
import torch
from torch import nn

from mpq.loss.cross_entropy import sample_losses
from mpq.models.placement import device_of
from mpq.running.apply import apply_plan

REPEATS = 3


def measure_pace(
    model: nn.Module, formats: Mapping[str, str], *, base: str, batch: int, length: int
) -> pl.DataFrame:
    """Seconds per token of a forward pass over (batch, length) tokens with its losses: one row, base and `formats` emulated.

    The shortest of three passes after one that is not counted. Rough on purpose: it serves to say minutes or hours.
    """
    device = device_of(model)
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    tokens = torch.randint(
        int(config.vocab_size), (batch, length), generator=torch.Generator().manual_seed(0)
    ).to(device)

    def pace() -> float:
        seconds = []
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            with torch.inference_mode():
                float(sample_losses(model, tokens).sum())  # reading the value waits for the device
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:]) / tokens.numel()

    plain = pace()
    with apply_plan(model, formats, base=base, backend="emulated"):
        lowered = pace()
    return pl.DataFrame({"base_s_per_token": [plain], "lowered_s_per_token": [lowered]})
