"""Time to first token of a model, in base and in other configurations, on the device's native kernels.

What one forward is and how it runs (eager, compiled, as a CUDA graph) is prefill.py's, what its seconds are read from clock.py's.
Weights may be random: their values do not decide the time.

Configurations are measured a block at a time, base among them (pairs.py), so that what the machine does meanwhile meets both;
a gain is the median of the differences to the base beside it.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import polars as pl
import torch
from torch import nn
from transformers.initialization import no_init_weights

from mpq.errors import MpqError
from mpq.formats.format import get_format
from mpq.kernels import Kind, check_native, device_name
from mpq.models.graph import build_on_meta
from mpq.models.partition import feeds_of
from mpq.models.positions import check_length
from mpq.running.apply import Mixed
from mpq.running.prefill import Prefill, Timed, compiled_blocks
from mpq.store.tables import SCHEMAS, table
from mpq.timing.clock import Clock, Wanted, clock_of
from mpq.timing.gpu_state import gpu_state
from mpq.timing.pairs import Pairs, compare, gain_statistics, keep_memory

Configuration: TypeAlias = tuple[str, ...]
Method: TypeAlias = Literal["signature", "group"]
Progress: TypeAlias = Callable[[int, int], None]  # done, total
BLOCK = 8  # configurations that share base runs; a task that is killed loses no more than these
BUSY, TRIES, PAUSE_S = 1.2, 4, 2.0


def timing_model(config: Any, base: str) -> nn.Module:
    """The architecture of `config` with random weights in the base format, to be timed; no checkpoint is needed."""
    dtype = getattr(torch, get_format(base).dtype)
    architecture: Any = type(
        build_on_meta(config)
    )  # trace's choice of class: causal or masked language model
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
    requests: Sequence[tuple[str, Sequence[Sequence[str]]]],
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
    return (
        pl.concat([rows[place] for place in sorted(rows)], how="diagonal_relaxed")
        if rows
        else table("timing", [])
    )


def measure_each(
    model: nn.Module,
    groups: pl.DataFrame,
    requests: Sequence[tuple[str, Sequence[Sequence[str]]]],
    *,
    base: str,
    batch: int,
    length: int,
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
    The configuration that is all base has gain 0 by definition. `repeats`, `target` and `cap`: see pairs.compare; `compiled` and
    `graph`: see prefill.py; `threads` and `clock`: see clock.py. `wanted` is asked, just before a place is measured, whether it
    still is.
    Raises MpqError before anything is measured where a format is not native, a signature is unknown, or a configuration
    does not fit its group.
    """
    check_length(model.config, length)
    if method not in ("signature", "group"):
        raise MpqError(f"Timing method {method!r}: expected signature or group.")
    base = get_format(base).name
    device = next(model.parameters()).device
    read = clock_of(device.type, threads, clock, graph)
    members = {s: _members(groups, s, method) for s, _ in requests}
    first_group = dict(groups.group_by("signature").agg(pl.col("group").min()).iter_rows())
    every = [
        (s, tuple(get_format(f).name for f in c))
        for s, configurations in requests
        for c in configurations
    ]
    for signature, configuration in every:
        _check(signature, configuration, members[signature], base, device.type)
    session = _Session(
        model,
        base,
        feeds_of(groups),
        read,
        {"batch": batch, "length": length, "compiled": compiled, "graph": graph, "seed": seed},
        (repeats, target, cap),
    )
    done = 0
    with session.open():
        for signature, places in _blocks(every, seed):
            asked = [place for place in places if not wanted or wanted(place)]
            if not asked:
                continue
            switched = members[signature]
            lowered = [place for place in asked if set(every[place][1]) != {base}]
            plans = [
                {
                    op: f
                    for group in switched
                    for (op, _), f in zip(group, every[place][1], strict=True)
                }
                for place in lowered
            ]
            found = session.compare(plans or [{}], seed + TRIES * done)
            beside = dict(zip(lowered, found, strict=False))
            for place in asked:
                pairs = beside.get(place, found[0])  # all base: the base beside another
                row = _row(pairs, len(switched), all_base=place not in beside) | {
                    "signature": signature,
                    "group": first_group[signature],
                    "configuration": list(every[place][1]),
                    "method": method,
                    "order_measured": done,
                }
                facts = {"measured_unix_s": time.time(), **session.facts(pairs)}
                row |= {k: v for k, v in facts.items() if k in SCHEMAS["timing"]}
                more = {k: v for k, v in facts.items() if k not in SCHEMAS["timing"]}
                done += 1
                yield (
                    place,
                    pl.concat([table("timing", [row]), pl.DataFrame([more])], how="horizontal"),
                )


def _row(pairs: Pairs, instances: int, all_base: bool = False) -> dict[str, object]:
    """What a configuration's runs say, in the columns of the table `timing`: gains are those of one instance."""
    gain, low, high = (0.0, 0.0, 0.0) if all_base else gain_statistics(pairs.base_s, pairs.config_s)
    base_ttft_s = float(np.median(pairs.base_s))
    return {
        "instances": instances,
        "repeats": len(pairs.base_s),
        "base_ttft_s": base_ttft_s,
        "ttft_s": base_ttft_s if all_base else float(np.median(pairs.config_s)),
        "gain_s": gain / instances,
        "gain_ci_low_s": low / instances,
        "gain_ci_high_s": high / instances,
        "significant": bool(low > 0 or high < 0),
        "predicted": False,
    }


def _blocks(wanted: Sequence[tuple[str, Configuration]], seed: int) -> list[tuple[str, list[int]]]:
    """Places in `wanted`, signatures one after the other, configurations within each in random order, at most BLOCK together."""
    rng = random.Random(seed)
    blocks: list[tuple[str, list[int]]] = []
    for signature in dict.fromkeys(s for s, _ in wanted):
        places = [i for i, (s, _) in enumerate(wanted) if s == signature]
        rng.shuffle(places)
        blocks += [(signature, places[i : i + BLOCK]) for i in range(0, len(places), BLOCK)]
    return blocks


def measure_ttft(
    model: nn.Module,
    plans: Sequence[Mapping[str, str]],
    *,
    base: str,
    batch: int,
    length: int,
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
    load_average, steal_share, disturbed, mode, waited_share, clock_mhz. Raises MpqError where the model lacks an op or the device a kernel.
    """
    device = next(model.parameters()).device
    session = _Session(
        model,
        base,
        {} if groups is None else feeds_of(groups),
        clock_of(device.type, threads, clock, graph),
        {"batch": batch, "length": length, "compiled": compiled, "graph": graph, "seed": seed},
        (repeats, target, cap),
    )
    rows: list[dict[str, object]] = []
    with session.open():
        for at in range(0, len(plans), BLOCK):
            for pairs in session.compare(plans[at : at + BLOCK], seed + TRIES * at):
                row = _row(pairs, 1)
                kept = {
                    k: row[k] for k in row if k not in ("instances", "significant", "predicted")
                }
                rows.append({**kept, **session.facts(pairs)})
            if progress:
                progress(len(rows), len(plans))
    return pl.DataFrame(rows)


def base_ttft(
    model: nn.Module,
    base: str,
    batch: int,
    length: int,
    repeats: int = 4,
    threads: int | None = None,
    clock: Wanted = "auto",
) -> float:
    """Seconds of an eager prefill in base: the median of `repeats` after one that is not timed. A rough figure, to plan by."""
    read = clock_of(next(model.parameters()).device.type, threads, clock, graph=False)
    mixed = Mixed(model, base=base, backend="native")
    try:
        with read.held():
            timed = Prefill(model, batch, length, graph=False).ready(mixed, {})
            return float(np.median([timed() for _ in range(repeats)]))
    finally:
        mixed.clear()


class _Session:
    """Comparisons against one base, a block at a time, on one clock.

    Where the clock counts waiting, a base far slower than the fastest one so far says that the machine is busy with something
    else, and the block is measured again after a pause, TRIES times at most; then its speed is taken for the machine's. Pauses
    together take no longer than the measuring has.
    """

    def __init__(
        self,
        model: nn.Module,
        base: str,
        feeds: Mapping[str, tuple[str, ...]],
        clock: Clock,
        prefill: Mapping[str, Any],
        pairs: tuple[int, float | None, int | None],
    ):
        self._new = partial(Mixed, model, base=base, backend="native", feeds=feeds)
        self._model, self._clock, self._how = model, clock, dict(prefill)
        now = time.thread_time if clock.reads == "cpu" else time.perf_counter
        self._prefill = Prefill(model, now=now, **prefill)
        self._device = next(model.parameters()).device
        self._repeats, self._target, self._cap = pairs
        self._fastest, self._patience_s = math.inf, 0.0

    @contextmanager
    def open(self) -> Iterator[None]:
        """The model ready to be timed inside the context, as it was before outside."""
        keep_memory()
        with self._clock.held(), compiled_blocks(self._model, self._how["compiled"]):
            yield

    def facts(self, pairs: Pairs) -> dict[str, Any]:
        """Where, on what and how it was measured, and what the machine was doing."""
        mhz = pairs.beside.clock_mhz
        return {
            "device": device_name(str(self._device), self._clock.threads),
            "batch": self._how["batch"],
            "length": self._how["length"],
            "clock": self._clock.reads,
            "threads": self._clock.threads,
            "load_average": pairs.load_average,
            "steal_share": pairs.beside.steal_share,
            "disturbed": pairs.disturbed,
            "mode": self._prefill.mode,
            "waited_share": pairs.beside.waited_share,
            **({"clock_mhz": mhz} if np.isfinite(mhz) else {}),
            **gpu_state(self._device),
        }

    def compare(self, plans: Sequence[Mapping[str, str]], seed: int) -> list[Pairs]:
        """What runs of base and of each plan gave; a first run of each, which prepares and compiles kernels, is not timed.

        Kernels are kept for these plans alone: their rounded weights take as much memory as the model.
        """
        mixed = self._new()
        try:
            base = self._prefill.ready(mixed, {})
            timed = [self._prefill.ready(mixed, formats) for formats in plans]
            return self._calm(base, timed, seed)
        finally:
            mixed.clear()

    def _calm(self, base: Timed, timed: Sequence[Timed], seed: int) -> list[Pairs]:
        for attempt in range(TRIES):
            start = time.monotonic()
            found = compare(
                base,
                timed,
                self._repeats,
                seed + attempt,
                target=self._target,
                cap=self._cap,
                waiting=self._clock.waits,
            )
            self._patience_s += time.monotonic() - start
            base_s = float(np.median(np.concatenate([pairs.base_s for pairs in found])))
            pause_s = PAUSE_S * (attempt + 1)
            self._fastest = min(self._fastest, base_s)
            slow = self._clock.waits and base_s > BUSY * self._fastest
            if not slow or pause_s > self._patience_s:
                break
            if attempt + 1 < TRIES:
                self._patience_s -= pause_s
                time.sleep(pause_s)
            else:
                self._fastest = base_s
        return found


def _members(groups: pl.DataFrame, signature: str, method: Method) -> list[list[tuple[str, str]]]:
    """The groups to switch, each as its (op, kind) in op order."""
    rows = groups.filter(pl.col("signature") == signature).sort("group", "order")
    if rows.is_empty():
        raise MpqError(
            f"No group has the signature {signature!r}: expected one of the groups table."
        )
    every = [
        list(part.select("op", "kind").iter_rows())
        for _, part in rows.group_by("group", maintain_order=True)
    ]
    return every if method == "signature" else every[:1]


def _check(
    signature: str,
    configuration: Configuration,
    ops: list[list[tuple[str, str]]],
    base: str,
    device: str,
) -> None:
    for group in ops:
        if len(group) != len(configuration):
            raise MpqError(
                f"Configuration {', '.join(configuration)} has {len(configuration)} formats, {signature} {len(group)} ops."
            )
        stuck = [
            op
            for (op, kind), f in zip(group, configuration, strict=True)
            if kind == "other" and f != base
        ]
        if stuck:
            raise MpqError(
                f"{stuck[0]} is no linear, no experts' product and none of attention's: it can only run in {base}."
            )
        for kind in get_args(Kind):
            wanted = (
                f for (_, k), f in zip(group, configuration, strict=True) if k == kind and f != base
            )
            check_native(wanted, device, kind)
