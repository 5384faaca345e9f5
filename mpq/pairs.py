"""Pairs of timings, base beside what is compared with it, on a machine that is never quite quiet.

Both halves of a pair meet the same drift; the order within pairs is balanced and random; medians shrug off spikes. Pairs that
a busy machine disturbed are told by their own slowness and by the time that the hypervisor took, and measured again.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

Timed: TypeAlias = Callable[[], float]  # one run; returns its seconds
RESAMPLES = 2000
SLOWEST = 1.05  # a run is disturbed when it takes this many medians and lies SPREADS deviations above
SPREADS = 6.0
STOLEN = 0.10  # or when the hypervisor took this share of the pair's time


@dataclass(frozen=True)
class Pairs:
    """Seconds of base and of what was compared with it, pair by pair; and what the machine was doing.

    `disturbed` pairs were measured and left out. `steal_share` is the share of all cores' time that the hypervisor took.
    """

    base_s: np.ndarray
    config_s: np.ndarray
    load_average: float
    steal_share: float
    disturbed: int = 0


def gain_statistics(base_s: np.ndarray, config_s: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The median of the paired differences base - config, and its 95 % bootstrap interval, in seconds.

    Medians shrug off spikes, pairs slow drift. A percentile bootstrap of a median is narrow with few pairs:
    with 5 it covers about 90 %.
    """
    differences = np.asarray(base_s, dtype=np.float64) - np.asarray(config_s, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(np.median(differences[draws], axis=1), (0.025, 0.975))
    return float(np.median(differences)), float(low), float(high)


def undisturbed(base_s: np.ndarray, config_s: np.ndarray, stolen: np.ndarray) -> np.ndarray:
    """Which pairs to keep: neither half far above its median, little time stolen. At least half are kept always.

    Each half is held against the median of its kind, so a pair is left out for slowness on either side, never for its gain.
    """
    keep = np.asarray(stolen) <= STOLEN
    for seconds in (np.asarray(base_s), np.asarray(config_s)):
        middle = np.median(seconds)
        spread = 1.4826 * np.median(np.abs(seconds - middle))  # the standard deviation, were they normal
        keep &= seconds <= max(SLOWEST * middle, middle + SPREADS * spread)
    if keep.sum() * 2 < len(keep):  # then the machine is simply like that
        return np.ones(len(keep), dtype=bool)
    return keep


def interleave(
    base: Timed, config: Timed, repeats: int, seed: int = 0, *, target: float | None = None, cap: int | None = None
) -> Pairs:  # fmt: skip
    """Time `repeats` pairs of runs, one of `base` and one of what is compared with it.

    The order within each two pairs, one of each order, is drawn from `seed`. Disturbed pairs are measured again, up to
    `cap` pairs in all (default 2 x repeats). With a `target`, pairs go on until the interval of the gain is at most
    2 x target of base's median wide, or there are `cap` pairs (default 4 x repeats).
    """
    rng, order = np.random.default_rng(seed), np.arange(2)
    seconds: tuple[list[float], list[float]] = ([], [])
    stolen: list[float] = []
    most = max(repeats, cap or (2 if target is None else 4) * repeats)
    with _quiet():
        first = before = _cpu_ticks()
        while True:
            # each second pair mirrors the one before, so that steady drift favours neither side
            order = order[::-1] if len(stolen) % 2 else rng.permutation(2)
            for which in order:
                seconds[which].append((base, config)[which]())
            after = _cpu_ticks()
            stolen.append((after[0] - before[0]) / max(1, after[1] - before[1]))
            before = after
            base_s, config_s = np.array(seconds[0]), np.array(seconds[1])
            keep = undisturbed(base_s, config_s, np.array(stolen))
            if len(stolen) >= most or (keep.sum() >= repeats and _settled(base_s[keep], config_s[keep], target, seed)):
                break
    steal = (before[0] - first[0]) / max(1, before[1] - first[1])
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return Pairs(base_s[keep], config_s[keep], load, float(steal), int((~keep).sum()))


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


def _cpu_ticks() -> tuple[int, int]:
    """(stolen by the hypervisor, total) clock ticks of all CPUs so far; zeros where /proc/stat is missing."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return 0, 0
    return (fields[7] if len(fields) > 7 else 0), sum(fields)
