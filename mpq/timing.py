"""Time to first token of a model, in base and in other configurations, on the device's native kernels.

TTFT is one prefill forward of the whole model over (batch, length) random tokens, without a cache, and with logits for
the last position of each row alone where the model can be asked for that, as engines do: the head works on `batch`
tokens, not on batch x length. Weights may be random: their values do not decide the time.

Base and configuration run in pairs, one beside the other in balanced random order, so that what the machine does meanwhile
meets both; a gain is the median of the differences within pairs, its interval a bootstrap over pairs.
"""

from __future__ import annotations

import copy
import gc
import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from mpq.apply import Mixed
from mpq.errors import MpqError
from mpq.formats import get_format
from mpq.graph import build_on_meta
from mpq.kernels import check_native, device_name
from mpq.tables import table

Configuration: TypeAlias = tuple[str, ...]
Method: TypeAlias = Literal["signature", "group"]
Progress: TypeAlias = Callable[[int, int], None]  # done, total
Run: TypeAlias = Callable[[], None]
RESAMPLES = 2000


@dataclass(frozen=True)
class Pairs:
    """Seconds of base and of what was compared with it, pair by pair; and what the machine was doing."""

    base_s: np.ndarray
    config_s: np.ndarray
    load_average: float
    steal_share: float


def timing_model(config: Any, base: str) -> nn.Module:
    """The architecture of `config` with random weights in the base format, to be timed; no checkpoint is needed."""
    dtype = getattr(torch, get_format(base).dtype)
    architecture: Any = type(build_on_meta(config))  # trace's choice of class: causal or masked language model
    with no_init_weights():
        model: nn.Module = architecture._from_config(copy.deepcopy(config), dtype=dtype)
    for parameter in model.parameters():
        # values of a real model's size: what is left in fresh memory may be subnormal or NaN, and slow
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.ones_(parameter)
    return model.eval().requires_grad_(False)


def gain_statistics(base_s: np.ndarray, config_s: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The median of the paired differences base - config, and its 95 % bootstrap interval, in seconds.

    Medians shrug off spikes, pairs slow drift. A percentile bootstrap of a median is narrow with few pairs:
    with 5 it covers about 90 %.
    """
    differences = np.asarray(base_s, dtype=np.float64) - np.asarray(config_s, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(np.median(differences[draws], axis=1), (0.025, 0.975))
    return float(np.median(differences)), float(low), float(high)


def interleave(
    switch: Callable[[int], None],
    run: Run,
    repeats: int,
    seed: int = 0,
    *,
    target: float | None = None,
    cap: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Pairs:
    """Time `repeats` pairs of `run`, in base (after `switch(0)`) and in what is compared with it (after `switch(1)`).

    The order within each two pairs, one of each order, is drawn from `seed`; switching is not timed. With a `target`, pairs go on until the
    interval of the gain is at most 2 x target of base's median wide, or there are `cap` pairs (default 4 x repeats).
    """
    rng, order = np.random.default_rng(seed), np.arange(2)
    seconds: tuple[list[float], list[float]] = ([], [])
    most = repeats if target is None else max(repeats, cap or 4 * repeats)
    with _quiet():
        before = _cpu_ticks()
        while len(seconds[0]) < most:
            # each second pair mirrors the one before, so that steady drift favours neither side
            order = order[::-1] if len(seconds[0]) % 2 else rng.permutation(2)
            for which in order:
                switch(int(which))
                start = clock()
                run()
                seconds[which].append(clock() - start)
            if target is not None and len(seconds[0]) >= repeats:
                _, low, high = gain_statistics(np.array(seconds[0]), np.array(seconds[1]), seed)
                if high - low <= 2 * target * float(np.median(seconds[0])):
                    break
        after = _cpu_ticks()
    steal = (after[0] - before[0]) / max(1, after[1] - before[1])
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return Pairs(np.array(seconds[0]), np.array(seconds[1]), load, float(steal))


def measure(
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
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Time gains of configurations, as the table `timing`: a row a configuration, in the order asked for.

    `requests` pairs a signature of the table `groups` with configurations, formats in op order. With method `signature` all groups of the
    signature are switched at once and the gain divided by their number; with `group` (the paper's) its first group alone.
    The configuration that is all base has gain 0 by definition. `target` and `cap`: see interleave.
    Raises MpqError before anything is measured where a format is not native, a signature is unknown, or a configuration
    does not fit its group.
    """
    if method not in ("signature", "group"):
        raise MpqError(f"Timing method {method!r}: expected signature or group.")
    base = get_format(base).name
    device = next(model.parameters()).device
    members = {s: _members(groups, s, method) for s, _ in requests}
    first_group = dict(groups.group_by("signature").agg(pl.col("group").min()).iter_rows())
    wanted = [(s, tuple(get_format(f).name for f in c)) for s, configurations in requests for c in configurations]
    for signature, configuration in wanted:
        _check(signature, configuration, members[signature], base, device.type)
    prefill = _prefill(model, _tokens(model, batch, length, seed))
    rows: list[dict[str, object]] = []
    base_pairs: dict[str, Pairs] = {}
    mixed, current = Mixed(model, base=base, backend="native"), ""
    try:
        prefill()
        for done, (signature, configuration) in enumerate(wanted):
            if signature != current:  # prepared weights of one signature at a time
                mixed.clear()
                mixed, current = Mixed(model, base=base, backend="native"), signature
            ops = members[signature]
            formats = {op: f for group in ops for (op, _), f in zip(group, configuration, strict=True)}
            all_base = set(configuration) == {base}
            if not (all_base and signature in base_pairs):
                pairs = _compare(mixed, prefill, {} if all_base else formats, repeats, seed + done, target, cap)
                base_pairs[signature] = pairs
            pairs = base_pairs[signature]
            gain, low, high = (0.0, 0.0, 0.0) if all_base else gain_statistics(pairs.base_s, pairs.config_s, seed)
            base_ttft_s = float(np.median(pairs.base_s))
            rows.append(
                {
                    "signature": signature, "group": first_group[signature], "configuration": list(configuration),
                    "instances": len(ops), "repeats": len(pairs.base_s), "base_ttft_s": base_ttft_s,
                    "ttft_s": base_ttft_s if all_base else float(np.median(pairs.config_s)),
                    "gain_s": gain / len(ops), "gain_ci_low_s": low / len(ops), "gain_ci_high_s": high / len(ops),
                    "device": device_name(str(device)), "method": method, "batch": batch, "length": length,
                    "load_average": pairs.load_average, "steal_share": pairs.steal_share,
                }
            )  # fmt: skip
            if progress:
                progress(done + 1, len(wanted))
    finally:
        mixed.clear()
    return table("timing", rows)


def measure_ttft(
    model: nn.Module,
    plans: Sequence[Mapping[str, str]],
    *,
    base: str,
    batch: int,
    length: int,
    repeats: int = 11,
    seed: int = 0,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """TTFT of whole plans (op → format), base interleaved; a row a plan, in the order given.

    Columns: ttft_s, base_ttft_s (medians), gain_s, gain_ci_low_s, gain_ci_high_s, repeats, device, batch, length,
    load_average, steal_share. Raises MpqError where the model lacks an op or the device a kernel.
    """
    device = str(next(model.parameters()).device)
    prefill = _prefill(model, _tokens(model, batch, length, seed))
    rows: list[dict[str, object]] = []
    for done, formats in enumerate(plans):
        mixed = Mixed(model, base=base, backend="native")
        try:
            pairs = _compare(mixed, prefill, formats, repeats, seed + done, None, None)
        finally:
            mixed.clear()
        gain, low, high = gain_statistics(pairs.base_s, pairs.config_s, seed)
        rows.append(
            {
                "ttft_s": float(np.median(pairs.config_s)), "base_ttft_s": float(np.median(pairs.base_s)), "gain_s": gain,
                "gain_ci_low_s": low, "gain_ci_high_s": high, "repeats": len(pairs.base_s), "device": device_name(device),
                "batch": batch, "length": length, "load_average": pairs.load_average, "steal_share": pairs.steal_share,
            }
        )  # fmt: skip
        if progress:
            progress(done + 1, len(plans))
    return pl.DataFrame(rows)


def _compare(
    mixed: Mixed, prefill: Run, formats: Mapping[str, str], repeats: int, seed: int, target: float | None, cap: int | None
) -> Pairs:
    """Pairs of base and `formats`; a first run of each, which prepares and compiles kernels, is not timed."""
    for warm in ({}, formats):
        mixed.set(warm)
        prefill()

    def switch(which: int) -> None:
        mixed.set(formats if which else {})

    return interleave(switch, prefill, repeats, seed, target=target, cap=cap)


def _prefill(model: nn.Module, tokens: Tensor) -> Run:
    """One prefill forward that has ended when it returns."""
    accepted = inspect.signature(model.forward).parameters
    options = {k: v for k, v in (("use_cache", False), ("logits_to_keep", 1)) if k in accepted}
    cuda = tokens.device.type == "cuda"

    @torch.inference_mode()
    def prefill() -> None:
        model(tokens, **options)
        if cuda:  # kernels run behind the program
            torch.cuda.synchronize(tokens.device)

    return prefill


def _tokens(model: nn.Module, batch: int, length: int, seed: int) -> Tensor:
    config = getattr(model, "config", None)
    vocabulary = config.get_text_config().vocab_size if config is not None else 2
    tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
    return tokens.to(next(model.parameters()).device)


def _members(groups: pl.DataFrame, signature: str, method: Method) -> list[list[tuple[str, str]]]:
    """The groups to switch, each as its (op, kind) in op order."""
    rows = groups.filter(pl.col("signature") == signature).sort("group", "order")
    if rows.is_empty():
        raise MpqError(f"No group has the signature {signature!r}: expected one of the groups table.")
    every = [list(part.select("op", "kind").iter_rows()) for _, part in rows.group_by("group", maintain_order=True)]
    return every if method == "signature" else every[:1]


def _check(signature: str, configuration: Configuration, ops: list[list[tuple[str, str]]], base: str, device: str) -> None:
    for group in ops:
        if len(group) != len(configuration):
            raise MpqError(
                f"Configuration {', '.join(configuration)} has {len(configuration)} formats, {signature} {len(group)} ops."
            )
        stuck = [op for (op, kind), f in zip(group, configuration, strict=True) if kind == "other" and f != base]
        if stuck:
            raise MpqError(f"{stuck[0]} is neither linear nor attention product: it can only run in {base}.")
        for kind in ("linear", "bgemm"):
            wanted = (f for (_, k), f in zip(group, configuration, strict=True) if k == kind and f != base)
            check_native(wanted, device, kind)


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection in between. None before either: with a pipeline loaded that takes longer than a pair."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cpu_ticks() -> tuple[int, int]:
    """(stolen by the hypervisor, total) clock ticks of all CPUs so far; zeros where /proc/stat is missing."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return 0, 0
    return (fields[7] if len(fields) > 7 else 0), sum(fields)
