"""Pairs of timings, base beside what is compared with it, on a machine that is never quite quiet.

Both halves of a pair meet the same drift; the order within pairs is balanced and random; medians shrug off spikes. Pairs that
a busy machine disturbed are told by their own slowness and by what the machine did meanwhile (machine.py), and measured again.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mpq.timing.machine import Interval, between, calm, load_average, reading

Timed: TypeAlias = Callable[[], float]  # one run; returns its seconds
RESAMPLES = 2000
SLOWEST = (
    1.05  # a run is disturbed when it takes this many medians and lies SPREADS deviations above
)
SPREADS = 6.0


@dataclass(frozen=True)
class Pairs:
    """Seconds of base and of what was compared with it, pair by pair; and what the machine was doing.

    `disturbed` pairs were measured and left out; `beside` covers them too.
    """

    base_s: np.ndarray
    config_s: np.ndarray
    load_average: float
    beside: Interval
    disturbed: int = 0


def gain_statistics(
    base_s: np.ndarray, config_s: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """The median of the paired differences base - config, and its 95 % bootstrap interval, in seconds.

    Medians shrug off spikes, pairs slow drift. A percentile bootstrap of a median is narrow with few pairs:
    with 5 it covers about 90 %.
    """
    differences = np.asarray(base_s, dtype=np.float64) - np.asarray(config_s, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(
        len(differences), size=(RESAMPLES, len(differences))
    )
    low, high = np.quantile(np.median(differences[draws], axis=1), (0.025, 0.975))
    return float(np.median(differences)), float(low), float(high)


def undisturbed(base_s: np.ndarray, config_s: np.ndarray, calm: np.ndarray) -> np.ndarray:
    """Which pairs to keep: neither half far above its median, the machine calm meanwhile. At least half are kept always.

    Each half is held against the median of its kind, so a pair is left out for slowness on either side, never for its gain.
    """
    keep = np.array(calm, dtype=bool)
    for seconds in (np.asarray(base_s), np.asarray(config_s)):
        middle = np.median(seconds)
        spread = 1.4826 * np.median(
            np.abs(seconds - middle)
        )  # the standard deviation, were they normal
        keep &= seconds <= max(SLOWEST * middle, middle + SPREADS * spread)
    if keep.sum() * 2 < len(keep):  # then the machine is simply like that
        return np.ones(len(keep), dtype=bool)
    return keep


def interleave(
    base: Timed,
    config: Timed,
    repeats: int,
    seed: int = 0,
    *,
    target: float | None = None,
    cap: int | None = None,
) -> Pairs:
    """Time `repeats` pairs of runs, one of `base` and one of what is compared with it.

    The order within each two pairs, one of each order, is drawn from `seed`. Disturbed pairs are measured again, up to
    `cap` pairs in all (default 2 x repeats). With a `target`, pairs go on until the interval of the gain is at most
    2 x target of base's median wide, or there are `cap` pairs (default 4 x repeats).
    """
    rng, order = np.random.default_rng(seed), np.arange(2)
    seconds: tuple[list[float], list[float]] = ([], [])
    meanwhile: list[Interval] = []
    most = max(repeats, cap or (2 if target is None else 4) * repeats)
    with _quiet():
        first, start = reading(), time.perf_counter()
        before, since = first, start
        while True:
            # each second pair mirrors the one before, so that steady drift favours neither side
            order = order[::-1] if len(meanwhile) % 2 else rng.permutation(2)
            for which in order:
                seconds[which].append((base, config)[which]())
            after, now = reading(), time.perf_counter()
            meanwhile.append(between(before, after, now - since))
            before, since = after, now
            base_s, config_s = np.array(seconds[0]), np.array(seconds[1])
            keep = undisturbed(base_s, config_s, calm(meanwhile))
            if len(meanwhile) >= most or (
                keep.sum() >= repeats and _settled(base_s[keep], config_s[keep], target, seed)
            ):
                break
    return Pairs(
        base_s[keep],
        config_s[keep],
        load_average(),
        between(first, before, since - start),
        int((~keep).sum()),
    )


def _settled(base_s: np.ndarray, config_s: np.ndarray, target: float | None, seed: int) -> bool:
    if target is None:
        return True
    _, low, high = gain_statistics(base_s, config_s, seed)
    return high - low <= 2 * target * float(np.median(base_s))


def keep_memory() -> None:
    """Let this process keep the memory that it frees, as an engine that serves does.

    glibc gives large blocks back to the kernel and gets them anew, page by page, in every forward pass: on the demo model 2
    to 4 ms of 58, more or less by what ran before, which no sum of gains can tell (docs/log.md). Elsewhere than on glibc nothing happens.
    """
    if sys.platform == "linux" and hasattr(mallopt := ctypes.CDLL(None), "mallopt"):
        mallopt.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the top of the heap back
        mallopt.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too


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
