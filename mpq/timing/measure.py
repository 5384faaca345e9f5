"""Time of a model's answers, in base and in other configurations, on the device's native kernels: to the first token, or to the last.

What one forward is and how it runs (eager, compiled, as a CUDA graph) is prefill.py's, tokens after the first are decode.py's, what
seconds are read from is clock.py's, and what of them counts answer.py's.
How base and configurations are set side by side is session.py's. Weights may be random: their values do not decide the time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from torch import nn
from transformers.initialization import no_init_weights

from mpq.formats.format import get_format
from mpq.kernels import Kind, check_native, device_name
from mpq.models.graph import build_on_meta
from mpq.models.partition import feeds_of
from mpq.models.positions import check_length
from mpq.running.apply import Mixed
from mpq.running.decode import Answers
from mpq.running.prefill import compiled_blocks
from mpq.store.tables import table
from mpq.timing.clock import Clock, Wanted, clock_of
from mpq.timing.gpu_state import gpu_state
from mpq.timing.pairs import keep_memory
from mpq.timing.session import BLOCK, Method, Progress, Ready, Request, plan_rows, rows_of


def timing_model(config: Any, base: str) -> nn.Module:
    """The architecture of `config` with random weights in the base format, to be timed; no checkpoint is needed."""
    dtype = getattr(torch, get_format(base).dtype)
    # trace's choice of class: causal or masked language model
    architecture: Any = type(build_on_meta(config))
    with no_init_weights():
        model: nn.Module = architecture._from_config(copy.deepcopy(config), dtype=dtype)
    for parameter in model.parameters():
        # values of a real model's size: what is left in fresh memory may be subnormal or NaN, and slow
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.ones_(parameter)
    return model.eval().requires_grad_(False)


def measure(
    model: nn.Module,
    groups: pl.DataFrame,
    requests: Sequence[Request],
    *,
    base: str,
    progress: Progress | None = None,
    **how: Any,
) -> pl.DataFrame:
    """Time gains of configurations, as the table `timing`: a row a configuration, in the order asked for.

    See measure_each, which this runs to its end; `progress` is called after each configuration.
    """
    rows: dict[int, pl.DataFrame] = {}
    total = sum(len(configurations) for _, configurations in requests)
    for place, row in measure_each(model, groups, requests, base=base, **how):
        rows[place] = row
        if progress:
            progress(len(rows), total)
    if not rows:
        return table("timing", [])
    return pl.concat([rows[place] for place in sorted(rows)], how="diagonal_relaxed")


def measure_each(
    model: nn.Module,
    groups: pl.DataFrame,
    requests: Sequence[Request],
    *,
    base: str,
    batch: int,
    length: int,
    output: int = 1,
    repeats: int = 4,
    method: Method = "signature",
    seed: int = 0,
    target: float | None = None,
    cap: int | None = None,
    compiled: bool = False,
    graph: bool = True,
    threads: int | None = None,
    clock: Wanted = "auto",
    wanted: Callable[[int], bool] | None = None,
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Time gains of configurations one after the other: each one's place in `requests` and its row of the table `timing`.

    They are measured a signature at a time, in random order (by `seed`; column `order_measured`), BLOCK of them beside one base.
    A row's `base_ttft_s` is of the base runs beside its own, so that over the further column `measured_unix_s` (when it was
    measured, in whatever call) it shows how the machine drifted. `significant` says whether the interval excludes zero.

    `requests` pairs a signature of the table `groups` with configurations, formats in op order. With method `signature` all
    groups of the signature are switched at once and the gain divided by their number; with `group` (the paper's) its first group
    alone. Further columns tell how long this process's threads waited for a core and, where known, the cores' clock (machine.py),
    and on a GPU its clocks, temperature, power and throttling (gpu_state.py) after each block.
    With `output` tokens an answer's further tokens count as well, and the columns of answer.SCHEMA tell of both parts.
    The configuration that is all base has gain 0 by definition. `repeats`, `target` and `cap`: see pairs.compare; `compiled` and
    `graph`: see prefill.py; `threads` and `clock`: see clock.py. `wanted` is asked, just before a place is measured, whether it
    still is.
    Raises MpqError before anything is measured where a format is not native, a signature is unknown, or a configuration
    does not fit its group.
    """
    check_length(model.config, length + output - 1)
    prompt = {"batch": batch, "length": length, "output": output}
    answers = {**prompt, "compiled": compiled, "graph": graph, "seed": seed}
    device = next(model.parameters()).device.type
    runner = _Torch(model, base, feeds_of(groups), clock_of(device, threads, clock, graph), answers)
    how: dict[str, Any] = {"method": method, "seed": seed, "target": target, "cap": cap}
    yield from rows_of(runner, groups, requests, base=base, repeats=repeats, wanted=wanted, **how)


def measure_ttft(
    model: nn.Module,
    plans: Sequence[Mapping[str, str]],
    *,
    base: str,
    batch: int,
    length: int,
    output: int = 1,
    groups: pl.DataFrame | None = None,
    repeats: int = 5,
    seed: int = 0,
    target: float | None = None,
    cap: int | None = None,
    compiled: bool = False,
    graph: bool = True,
    threads: int | None = None,
    clock: Wanted = "auto",
    progress: Progress | None = None,
) -> pl.DataFrame:
    """TTFT of whole plans (op → format), BLOCK of them beside one base; a row a plan, in the order given.

    The table `groups` tells who reads whose output: neighbours in BF16 then run without casts in between, as in measure.
    Columns: ttft_s, base_ttft_s (medians), gain_s, gain_ci_low_s, gain_ci_high_s, repeats, device, batch, length, clock, threads,
    load_average, steal_share, disturbed, mode, waited_share, clock_mhz; with several `output` tokens those of answer.SCHEMA.
    Raises MpqError where the model lacks an op or the device a kernel, and for prompts beyond its table of positions.
    """
    check_length(model.config, length + output - 1)
    device = next(model.parameters()).device.type
    prompt = {"batch": batch, "length": length, "output": output}
    answers = {**prompt, "compiled": compiled, "graph": graph, "seed": seed}
    feeds = {} if groups is None else feeds_of(groups)
    runner = _Torch(model, base, feeds, clock_of(device, threads, clock, graph), answers)
    return plan_rows(
        runner, plans, repeats=repeats, seed=seed, target=target, cap=cap, progress=progress
    )


def base_ttft(
    model: nn.Module,
    base: str,
    batch: int,
    length: int,
    output: int = 1,
    repeats: int = 4,
    threads: int | None = None,
    clock: Wanted = "auto",
) -> float:
    """Seconds of an eager run in base (as long as it takes, whatever it stands for): the median of `repeats` after one that is not
    timed. A rough figure, to plan by."""
    check_length(model.config, length + output - 1)
    read = clock_of(next(model.parameters()).device.type, threads, clock, graph=False)
    mixed = Mixed(model, base=base, backend="native")
    try:
        with read.held():
            timed = Answers(model, batch, length, output, graph=False).ready(mixed, {})
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                timed()
                seconds.append(time.perf_counter() - start)
            return float(np.median(seconds))
    finally:
        mixed.clear()


class _Torch:
    """Forwards of a model in this process, on the device's native kernels."""

    together = BLOCK

    def __init__(
        self,
        model: nn.Module,
        base: str,
        feeds: Mapping[str, tuple[str, ...]],
        clock: Clock,
        answers: Mapping[str, Any],
    ):
        self._new = partial(Mixed, model, base=base, backend="native", feeds=feeds)
        self._model, self._clock, self._how = model, clock, dict(answers)
        now = time.thread_time if clock.reads == "cpu" else time.perf_counter
        self._answers = Answers(model, now=now, **answers)
        self._device = next(model.parameters()).device

    @property
    def waits(self) -> bool:
        return self._clock.waits

    @contextmanager
    def opened(self) -> Iterator[None]:
        keep_memory()
        with self._clock.held(), compiled_blocks(self._model, self._how["compiled"]):
            yield

    @contextmanager
    def block(self) -> Iterator[Ready]:
        """Kernels are kept for the plans of a block alone: their rounded weights take as much memory as the model."""
        mixed = self._new()
        try:
            yield partial(self._answers.ready, mixed)
        finally:
            mixed.clear()

    def facts(self) -> dict[str, Any]:
        return {
            "device": device_name(str(self._device), self._clock.threads),
            "batch": self._how["batch"],
            "length": self._how["length"],
            **({"output": self._how["output"]} if self._how["output"] > 1 else {}),
            "clock": self._clock.reads,
            "threads": self._clock.threads,
            "mode": self._answers.mode,
            **gpu_state(self._device),
        }

    def check(self, formats: Sequence[str], kind: str) -> None:
        check_native(formats, self._device.type, cast(Kind, kind))
