"""Time to first token of a model, in base and in other configurations, on the device's native kernels.

What one forward is and how it runs (eager, compiled, as a CUDA graph) is prefill.py's. Weights may be random: their values
do not decide the time.

Base and configuration run in pairs, one beside the other in balanced random order (pairs.py), so that what the machine does
meanwhile meets both; a gain is the median of the differences within pairs, its interval a bootstrap over pairs.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import polars as pl
import torch
from torch import nn
from transformers.initialization import no_init_weights

from mpq.errors import MpqError
from mpq.formats.format import get_format
from mpq.kernels import check_native, device_name
from mpq.models.graph import build_on_meta
from mpq.models.partition import feeds_of
from mpq.models.positions import check_length
from mpq.running.apply import Mixed
from mpq.running.prefill import Prefill, Timed, compiled_blocks
from mpq.store.tables import table
from mpq.timing.gpu_state import gpu_state
from mpq.timing.pairs import Pairs, gain_statistics, interleave, keep_memory

Configuration: TypeAlias = tuple[str, ...]
Method: TypeAlias = Literal["signature", "group"]
Progress: TypeAlias = Callable[[int, int], None]  # done, total
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
    repeats: int = 11,
    method: Method = "signature",
    seed: int = 0,
    target: float | None = None,
    cap: int | None = None,
    compiled: bool = False,
    graph: bool = True,
    wanted: Callable[[int], bool] | None = None,
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Time gains of configurations one after the other: each one's place in `requests` and its row of the table `timing`.

    They are measured in random order (by `seed`; column `measured`), a signature at a time. Each row has its own base, so
    column `base_ttft_s` over the further column `measured_unix_s` (when it was measured, in whatever call) shows how the machine
    drifted. `significant` says whether the interval excludes zero.

    `requests` pairs a signature of the table `groups` with configurations, formats in op order. With method `signature` all groups of the
    signature are switched at once and the gain divided by their number; with `group` (the paper's) its first group alone.
    Further columns tell how long this process's threads waited for a core and, where known, the cores' clock (machine.py), and on a GPU its clocks,
    temperature, power and throttling (gpu_state.py) after each comparison.
    The configuration that is all base has gain 0 by definition. `target` and `cap`: see interleave; `compiled` and `graph`: see
    prefill.py. `wanted` is asked, just before a place is measured, whether it still is.
    Raises MpqError before anything is measured where a format is not native, a signature is unknown, or a configuration
    does not fit its group.
    """
    check_length(model.config, length)
    if method not in ("signature", "group"):
        raise MpqError(f"Timing method {method!r}: expected signature or group.")
    base = get_format(base).name
    device = next(model.parameters()).device
    members = {s: _members(groups, s, method) for s, _ in requests}
    first_group = dict(groups.group_by("signature").agg(pl.col("group").min()).iter_rows())
    every = [
        (s, tuple(get_format(f).name for f in c))
        for s, configurations in requests
        for c in configurations
    ]
    for signature, configuration in every:
        _check(signature, configuration, members[signature], base, device.type)
    prefill = Prefill(model, batch, length, seed=seed, compiled=compiled, graph=graph)
    base_pairs: dict[str, Pairs] = {}
    current = ""
    session = _Session(model, base, feeds_of(groups), prefill, repeats, target, cap)
    with session.open(compiled):
        for done, place in enumerate(_measuring_order(every, seed)):
            if wanted and not wanted(place):
                continue
            signature, configuration = every[place]
            if signature != current:  # prepared weights of one signature at a time
                current = signature
                session.forget()
            ops = members[signature]
            formats = {
                op: f for group in ops for (op, _), f in zip(group, configuration, strict=True)
            }
            all_base = set(configuration) == {base}
            if not (all_base and signature in base_pairs):
                pairs = session.compare({} if all_base else formats, seed + TRIES * done)
                base_pairs[signature] = pairs
            pairs = base_pairs[signature]
            state = {"measured_unix_s": time.time(), **_cpu_state(pairs), **gpu_state(device)}
            gain, low, high = (
                (0.0, 0.0, 0.0) if all_base else gain_statistics(pairs.base_s, pairs.config_s, seed)
            )
            base_ttft_s = float(np.median(pairs.base_s))
            row = {
                "signature": signature,
                "group": first_group[signature],
                "configuration": list(configuration),
                "instances": len(ops),
                "repeats": len(pairs.base_s),
                "base_ttft_s": base_ttft_s,
                "ttft_s": base_ttft_s if all_base else float(np.median(pairs.config_s)),
                "gain_s": gain / len(ops),
                "gain_ci_low_s": low / len(ops),
                "gain_ci_high_s": high / len(ops),
                "device": device_name(str(device)),
                "method": method,
                "batch": batch,
                "length": length,
                "load_average": pairs.load_average,
                "steal_share": pairs.beside.steal_share,
                "disturbed": pairs.disturbed,
                "measured": done,
                "significant": bool(low > 0 or high < 0),
                "mode": prefill.mode,
            }
            yield (
                place,
                pl.concat([table("timing", [row]), pl.DataFrame([state])], how="horizontal"),
            )


def _measuring_order(wanted: Sequence[tuple[str, Configuration]], seed: int) -> list[int]:
    """Places in `wanted`, signatures one after the other, configurations within each in random order."""
    rng = random.Random(seed)
    order: list[int] = []
    for signature in dict.fromkeys(s for s, _ in wanted):
        places = [i for i, (s, _) in enumerate(wanted) if s == signature]
        rng.shuffle(places)
        order += places
    return order


def measure_ttft(
    model: nn.Module,
    plans: Sequence[Mapping[str, str]],
    *,
    base: str,
    batch: int,
    length: int,
    groups: pl.DataFrame | None = None,
    repeats: int = 11,
    seed: int = 0,
    target: float | None = None,
    cap: int | None = None,
    compiled: bool = False,
    graph: bool = True,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """TTFT of whole plans (op → format), base interleaved; a row a plan, in the order given.

    The table `groups` tells who reads whose output: neighbours in BF16 then run without casts in between, as in measure.
    Columns: ttft_s, base_ttft_s (medians), gain_s, gain_ci_low_s, gain_ci_high_s, repeats, device, batch, length,
    load_average, steal_share, disturbed, mode, waited_share, clock_mhz. Raises MpqError where the model lacks an op or the device a kernel.
    """
    device = str(next(model.parameters()).device)
    prefill = Prefill(model, batch, length, seed=seed, compiled=compiled, graph=graph)
    session = _Session(
        model, base, {} if groups is None else feeds_of(groups), prefill, repeats, target, cap
    )
    rows: list[dict[str, object]] = []
    with session.open(compiled):
        for done, formats in enumerate(plans):
            session.forget()
            pairs = session.compare(formats, seed + TRIES * done)
            gain, low, high = gain_statistics(pairs.base_s, pairs.config_s, seed)
            rows.append(
                {
                    "ttft_s": float(np.median(pairs.config_s)),
                    "base_ttft_s": float(np.median(pairs.base_s)),
                    "gain_s": gain,
                    "gain_ci_low_s": low,
                    "gain_ci_high_s": high,
                    "repeats": len(pairs.base_s),
                    "device": device_name(device),
                    "batch": batch,
                    "length": length,
                    "load_average": pairs.load_average,
                    "steal_share": pairs.beside.steal_share,
                    "disturbed": pairs.disturbed,
                    "mode": prefill.mode,
                    **_cpu_state(pairs),
                    **gpu_state(device),
                }
            )
            if progress:
                progress(done + 1, len(plans))
    return pl.DataFrame(rows)


def base_ttft(model: nn.Module, base: str, batch: int, length: int, repeats: int = 3) -> float:
    """Seconds of an eager prefill in base: the median of `repeats` after one that is not timed. A rough figure, to plan by."""
    mixed = Mixed(model, base=base, backend="native")
    try:
        timed = Prefill(model, batch, length, graph=False).ready(mixed, {})
        return float(np.median([timed() for _ in range(repeats)]))
    finally:
        mixed.clear()


class _Session:
    """Comparisons against one base, re-anchored through the run: a base far slower than the fastest one so far says that the
    machine is busy with something else, and the comparison is made again after a pause, TRIES times at most; then its speed is
    taken for the machine's. Pauses together take no longer than the measuring has."""

    def __init__(
        self,
        model: nn.Module,
        base: str,
        feeds: Mapping[str, tuple[str, ...]],
        prefill: Prefill,
        repeats: int,
        target: float | None = None,
        cap: int | None = None,
    ):
        self._new = partial(Mixed, model, base=base, backend="native", feeds=feeds)
        self._model, self._prefill = model, prefill
        self._repeats, self._target, self._cap = repeats, target, cap
        self._fastest, self._patience_s = math.inf, 0.0
        self._base: Timed | None = None
        self._mixed = self._new()

    @contextmanager
    def open(self, compiled: bool) -> Iterator[None]:
        """The model ready to be timed inside the context, as it was before outside."""
        keep_memory()
        with compiled_blocks(self._model, compiled):
            try:
                yield
            finally:
                self._mixed.clear()

    def forget(self) -> None:
        """Drop the kernels prepared so far: their rounded weights take as much memory as the model."""
        self._mixed.clear()
        self._mixed, self._base = self._new(), None

    def compare(self, formats: Mapping[str, str], seed: int) -> Pairs:
        """Pairs of base and `formats`; a first run of each, which prepares and compiles kernels, is not timed."""
        if self._base is None:
            self._base = self._prefill.ready(self._mixed, {})
        config = self._prefill.ready(self._mixed, formats)
        for attempt in range(TRIES):
            start = time.monotonic()
            pairs = interleave(
                self._base,
                config,
                self._repeats,
                seed + attempt,
                target=self._target,
                cap=self._cap,
            )
            self._patience_s += time.monotonic() - start
            base_s, pause_s = float(np.median(pairs.base_s)), PAUSE_S * (attempt + 1)
            self._fastest = min(self._fastest, base_s)
            if base_s <= BUSY * self._fastest or pause_s > self._patience_s:
                break
            if attempt + 1 < TRIES:
                self._patience_s -= pause_s
                time.sleep(pause_s)
            else:
                self._fastest = base_s
        return pairs


def _cpu_state(pairs: Pairs) -> dict[str, float]:
    known = {"clock_mhz": pairs.beside.clock_mhz} if np.isfinite(pairs.beside.clock_mhz) else {}
    return {"waited_share": pairs.beside.waited_share, **known}


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
                f"{stuck[0]} is neither linear nor attention product: it can only run in {base}."
            )
        for kind in ("linear", "bgemm"):
            wanted = (
                f for (_, k), f in zip(group, configuration, strict=True) if k == kind and f != base
            )
            check_native(wanted, device, kind)
