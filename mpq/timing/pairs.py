"""Runs of base beside runs of what is compared with it, on a machine that is never quite quiet.

Configurations share their base: in a round each runs once, in random order, and base runs at both ends and between every few
of them. A configuration is held against the base runs around it, so that both meet the same drift; medians shrug off spikes.
Runs that a busy machine disturbed are told by their own slowness and by what the machine did meanwhile (machine.py), and made again.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mpq.timing.machine import Interval, between, calm, load_average, reading

# one run; returns its seconds, or of an answer those to its first token and those of all further ones
Timed: TypeAlias = Callable[[], float | tuple[float, float]]
BETWEEN = 4  # runs between two runs of base
# a run is disturbed when it takes this many medians and lies SPREADS deviations above
SLOWEST = 1.05
SPREADS = 6.0
NORMAL_95 = 1.96  # half a 95 % interval, in standard errors


@dataclass(frozen=True)
class Pairs:
    """Seconds of a configuration and of the base beside it, run by run; and what the machine was doing.

    `disturbed` pairs were measured and left out; `beside` covers them too. `first_s` are, of runs that answer with several
    tokens, base's and the configuration's seconds to the first one.
    """

    base_s: np.ndarray
    config_s: np.ndarray
    load_average: float
    beside: Interval
    disturbed: int = 0
    first_s: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Base's and the configuration's seconds of each part of a run: up to the first token, after it; or of the whole."""
        whole = self.base_s, self.config_s
        if self.first_s is None:
            return [whole]
        return [self.first_s, (whole[0] - self.first_s[0], whole[1] - self.first_s[1])]

    def gain(self) -> tuple[float, float, float]:
        """What the configuration gains (s), and its 95 % interval: see gain_statistics. Gains of a run's parts add up."""
        found = [gain_statistics(*part) for part in self.parts]
        gain = math.fsum(middle for middle, _, _ in found)
        half = math.hypot(*(high - middle for middle, _, high in found))
        return (gain, gain - half, gain + half) if self.first_s else found[0]


def gain_statistics(base_s: np.ndarray, config_s: np.ndarray) -> tuple[float, float, float]:
    """The median of the paired differences base - config, and its 95 % interval, in seconds.

    Medians shrug off spikes, pairs slow drift. The interval is the median's own standard error, from the mean deviation
    from it, as wide as few pairs ask for: it holds the truth 95 times in 100 from two pairs on (the tests simulate it).
    """
    differences = np.asarray(base_s, dtype=np.float64) - np.asarray(config_s, dtype=np.float64)
    n, middle = len(differences), float(np.median(differences))
    deviation = float(np.abs(differences - middle).mean()) * np.sqrt(np.pi / 2)
    error = deviation * np.sqrt(np.pi / 2 / n)
    half = NORMAL_95 * float(few(n)) * float(error)
    return middle, middle - half, middle + half


def few(pairs: int | np.ndarray) -> np.ndarray:
    """How much wider than 1.96 standard errors a 95 % interval of so many pairs is: Student's t for a median and its mean
    deviation, fitted to simulated normal differences (3 to 40 pairs; within 4 %, too wide for 4)."""
    freedom = np.maximum(np.asarray(pairs, dtype=np.float64) - 1, 1)
    return 1 + 0.8 / freedom + 4 / freedom**2


def undisturbed(base_s: np.ndarray, config_s: np.ndarray, calm: np.ndarray) -> np.ndarray:
    """Which pairs to keep: neither half far above its median, the machine calm meanwhile. At least half are kept always, and
    no single pair, whose interval would have no width.

    Each half is held against the median of its kind, so a pair is left out for slowness on either side, never for its gain.
    """
    keep = np.array(calm, dtype=bool)
    for seconds in (np.asarray(base_s), np.asarray(config_s)):
        middle = np.median(seconds)
        # the standard deviation, were they normal
        spread = 1.4826 * np.median(np.abs(seconds - middle))
        keep &= seconds <= max(SLOWEST * middle, middle + SPREADS * spread)
    if keep.sum() < max(2, len(keep) / 2):  # then the machine is simply like that
        return np.ones(len(keep), dtype=bool)
    return keep


class _Runs:
    """The runs of one configuration so far, and which of them count."""

    def __init__(self, timed: Timed):
        self.timed = timed
        self.base_s, self.config_s = list[np.ndarray](), list[np.ndarray]()  # by a run's parts
        self.meanwhile = list[Interval]()

    def pairs(self, beside: Interval, waiting: bool) -> Pairs:
        parts = np.array(self.base_s), np.array(self.config_s)
        base_s, config_s = (of.sum(axis=1) for of in parts)
        keep = undisturbed(base_s, config_s, calm(self.meanwhile, waiting))
        first = None if parts[0].shape[1] == 1 else (parts[0][keep, 0], parts[1][keep, 0])
        left_out = int((~keep).sum())
        return Pairs(base_s[keep], config_s[keep], load_average(), beside, left_out, first)


def compare(
    base: Timed,
    configs: Sequence[Timed],
    repeats: int,
    seed: int = 0,
    *,
    target: float | None = None,
    cap: int | None = None,
    waiting: bool = True,
) -> list[Pairs]:
    """Time each of `configs` at least `repeats` times, base beside them; what they gave, in the order given.

    A round runs each once, in an order drawn from `seed`, with base at both ends and after every BETWEEN of them: n take about
    5/4 n + 1 runs. A configuration's base is that before and that after it, weighted by nearness, so that steady drift favours
    none. Disturbed runs are made again, in up to `cap` rounds (default 2 x repeats). With a `target`, rounds go on until gains are
    known to that share of base's median, or there are `cap` (default 4 x repeats): until half of their intervals are at most
    twice as wide. To stop each one where its own interval is narrow would choose intervals that are narrow by luck.
    `waiting` says whether the clock counts the time that a thread waits for a core (wall time does), so that it disturbs.
    """
    rng = np.random.default_rng(seed)
    most = max(repeats, cap or (2 if target is None else 4) * repeats)
    runs = [_Runs(timed) for timed in configs]
    with _quiet():
        first, since = reading(), time.perf_counter()
        for done in range(1, most + 1):
            order = rng.permutation(len(runs))
            last_s = _seconds(base)
            for at in range(0, len(order), BETWEEN):
                last_s = _segment(base, [runs[i] for i in order[at : at + BETWEEN]], last_s)
            if done < repeats:
                continue
            beside = between(first, reading(), time.perf_counter() - since)
            found = [of.pairs(beside, waiting) for of in runs]
            if min(len(pairs.base_s) for pairs in found) >= repeats and _settled(found, target):
                break
    return found


def _seconds(timed: Timed) -> np.ndarray:
    return np.atleast_1d(np.asarray(timed(), dtype=np.float64))


def _segment(base: Timed, runs: Sequence[_Runs], before_s: np.ndarray) -> np.ndarray:
    """Run each once and base after them, which took `before_s` before them; returns base's seconds after them."""
    first, since = reading(), time.perf_counter()
    seconds = [_seconds(of.timed) for of in runs]
    after_s = _seconds(base)
    meanwhile = between(first, reading(), time.perf_counter() - since)
    for place, (of, config_s) in enumerate(zip(runs, seconds, strict=True), 1):
        share = place / (len(runs) + 1)
        of.base_s.append((1 - share) * before_s + share * after_s)
        of.config_s.append(config_s)
        of.meanwhile.append(meanwhile)
    return after_s


def _settled(found: Sequence[Pairs], target: float | None) -> bool:
    if target is None:
        return True
    widths = []
    for pairs in found:
        _, low, high = pairs.gain()
        widths.append((high - low) / float(np.median(pairs.base_s)))
    return float(np.median(widths)) <= 2 * target


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
