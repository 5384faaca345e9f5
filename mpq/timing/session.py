"""Base and configurations side by side, a block at a time, whatever runs the forwards: this process's torch, or an engine.

Configurations are measured a block at a time, base among them (pairs.py), so that what the machine does meanwhile meets both;
a gain is the median of the differences to the base beside it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import polars as pl

from mpq.errors import MpqError
from mpq.formats.format import get_format
from mpq.formats.scheme import get_scheme
from mpq.kernels import Kind
from mpq.store.tables import SCHEMAS, table
from mpq.timing.answer import parts_of
from mpq.timing.pairs import Pairs, Timed, compare

Configuration: TypeAlias = tuple[str, ...]
_Ops: TypeAlias = list[tuple[str, str]]  # a group's ops, each with its kind
Request: TypeAlias = tuple[str, Sequence[Sequence[str]]]  # signature, configurations
Method: TypeAlias = Literal["signature", "group"]
Progress: TypeAlias = Callable[[int, int], None]  # done, total
Ready: TypeAlias = Callable[[Mapping[str, str]], Timed]  # op → format to a forward, prepared
BLOCK = 8  # configurations that share base runs; a task that is killed loses no more than these
BUSY, TRIES, PAUSE_S = 1.2, 4, 2.0


class Runner(Protocol):
    """What runs the forwards that are timed.

    `waits` says whether its clock counts the time that a thread waits for a core, `together` how many configurations it can have
    ready at once.
    """

    @property
    def waits(self) -> bool:
        """See above."""

    @property
    def together(self) -> int:
        """See above."""

    def opened(self) -> AbstractContextManager[None]:
        """Ready to run inside the context, as before outside."""

    def block(self) -> AbstractContextManager[Ready]:
        """What prepares forwards; what it prepared lasts as long as the context."""

    def facts(self) -> dict[str, Any]:
        """Where, on what and how it runs, in the columns of the table `timing` and beside them."""

    def check(self, formats: Sequence[str], kind: str) -> None:
        """Raise MpqError for formats in which it has no product of this kind."""


def rows_of(
    runner: Runner,
    groups: pl.DataFrame,
    requests: Sequence[Request],
    *,
    base: str,
    repeats: int,
    method: Method = "signature",
    seed: int = 0,
    target: float | None = None,
    cap: int | None = None,
    wanted: Callable[[int], bool] | None = None,
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Each configuration's place in `requests` and its row of the table `timing`; see measure.measure_each."""
    if method not in ("signature", "group"):
        raise MpqError(f"Timing method {method!r}: expected signature or group.")
    base = get_format(base).name
    members = {s: _members(groups, s, method) for s, _ in requests}
    first_group = dict(groups.group_by("signature").agg(pl.col("group").min()).iter_rows())
    every = [
        (s, tuple(get_scheme(f).name for f in c))
        for s, configurations in requests
        for c in configurations
    ]
    for signature, configuration in every:
        _check(signature, configuration, members[signature], base, runner)
    session = Session(runner, repeats, target, cap)
    done = 0
    with runner.opened():
        for signature, places in _blocks(every, seed, runner.together):
            asked = [place for place in places if not wanted or wanted(place)]
            if not asked:
                continue
            switched = members[signature]
            lowered = [place for place in asked if set(every[place][1]) != {base}]
            plans = [_plan(switched, every[place][1]) for place in lowered]
            found = session.compare(plans or [{}], seed + TRIES * done)
            beside = dict(zip(lowered, found, strict=False))
            for place in asked:
                pairs = beside.get(place, found[0])  # all base: the base beside another
                instances, all_base = len(switched), place not in beside
                row = _row(pairs, instances, all_base) | {
                    "signature": signature,
                    "group": first_group[signature],
                    "configuration": list(every[place][1]),
                    "method": method,
                    "order_measured": done,
                }
                facts = {"measured_unix_s": time.time(), **session.facts(pairs)}
                facts |= parts_of(pairs, facts.get("output", 1), instances, all_base)
                row |= {k: v for k, v in facts.items() if k in SCHEMAS["timing"]}
                more = {k: v for k, v in facts.items() if k not in SCHEMAS["timing"]}
                done += 1
                both = pl.concat([table("timing", [row]), pl.DataFrame([more])], how="horizontal")
                yield place, both


def _plan(groups: Sequence[_Ops], configuration: Configuration) -> dict[str, str]:
    """Op → format, each of the groups in the configuration."""
    return {op: f for ops in groups for (op, _), f in zip(ops, configuration, strict=True)}


def _row(pairs: Pairs, instances: int, all_base: bool = False) -> dict[str, object]:
    """What a configuration's runs say, in the columns of the table `timing`: gains are those of one instance."""
    gain, low, high = (0.0, 0.0, 0.0) if all_base else pairs.gain()
    base_ttft_s, ttft_s = (float(np.median(s)) for s in pairs.parts[0])
    return {
        "instances": instances,
        "repeats": len(pairs.base_s),
        "base_ttft_s": base_ttft_s,
        "ttft_s": base_ttft_s if all_base else ttft_s,
        "gain_s": gain / instances,
        "gain_ci_low_s": low / instances,
        "gain_ci_high_s": high / instances,
        "significant": bool(low > 0 or high < 0),
        "predicted": False,
    }


def _blocks(
    wanted: Sequence[tuple[str, Configuration]], seed: int, size: int
) -> list[tuple[str, list[int]]]:
    """Places in `wanted`, signatures one after the other, configurations within each in random order, at most `size` together."""
    rng = random.Random(seed)
    blocks: list[tuple[str, list[int]]] = []
    for signature in dict.fromkeys(s for s, _ in wanted):
        places = [i for i, (s, _) in enumerate(wanted) if s == signature]
        rng.shuffle(places)
        blocks += [(signature, places[i : i + size]) for i in range(0, len(places), size)]
    return blocks


def plan_rows(
    runner: Runner,
    plans: Sequence[Mapping[str, str]],
    *,
    repeats: int,
    seed: int = 0,
    target: float | None = None,
    cap: int | None = None,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Times of whole plans (op → format), a row a plan, in the order given; see measure.measure_ttft."""
    session = Session(runner, repeats, target, cap)
    rows: list[dict[str, object]] = []
    with runner.opened():
        for at in range(0, len(plans), runner.together):
            some = plans[at : at + runner.together]
            for pairs in session.compare(some, seed + TRIES * at):
                row = _row(pairs, 1)
                kept = {
                    k: row[k] for k in row if k not in ("instances", "significant", "predicted")
                }
                facts = session.facts(pairs)
                rows.append({**kept, **facts, **parts_of(pairs, facts.get("output", 1))})
            if progress:
                progress(len(rows), len(plans))
    return pl.DataFrame(rows)


class Session:
    """Comparisons against one base, a block at a time, on one clock.

    Where the clock counts waiting, a base far slower than the fastest one so far says that the machine is busy with something
    else, and the block is measured again after a pause, TRIES times at most; then its speed is taken for the machine's. Pauses
    together take no longer than the measuring has.
    """

    def __init__(self, runner: Runner, repeats: int, target: float | None, cap: int | None):
        self._runner = runner
        self._repeats, self._target, self._cap = repeats, target, cap
        self._fastest, self._patience_s = math.inf, 0.0

    def facts(self, pairs: Pairs) -> dict[str, Any]:
        """Where, on what and how it was measured, and what the machine was doing."""
        mhz = pairs.beside.clock_mhz
        return {
            "load_average": pairs.load_average,
            "steal_share": pairs.beside.steal_share,
            "disturbed": pairs.disturbed,
            "waited_share": pairs.beside.waited_share,
            **({"clock_mhz": mhz} if np.isfinite(mhz) else {}),
            **self._runner.facts(),
        }

    def compare(self, plans: Sequence[Mapping[str, str]], seed: int) -> list[Pairs]:
        """What runs of base and of each plan gave; a first run of each, which prepares and compiles kernels, is not timed."""
        with self._runner.block() as ready:
            base = ready({})
            return self._calm(base, [ready(formats) for formats in plans], seed)

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
                waiting=self._runner.waits,
            )
            self._patience_s += time.monotonic() - start
            base_s = float(np.median(np.concatenate([pairs.base_s for pairs in found])))
            pause_s = PAUSE_S * (attempt + 1)
            self._fastest = min(self._fastest, base_s)
            slow = self._runner.waits and base_s > BUSY * self._fastest
            if not slow or pause_s > self._patience_s:
                break
            if attempt + 1 < TRIES:
                self._patience_s -= pause_s
                time.sleep(pause_s)
            else:
                self._fastest = base_s
        return found


def _members(groups: pl.DataFrame, signature: str, method: Method) -> list[_Ops]:
    """The groups to switch."""
    rows = groups.filter(pl.col("signature") == signature).sort("group", "order")
    if rows.is_empty():
        raise MpqError(
            f"No group has the signature {signature!r}: expected one of the groups table."
        )
    by_group = rows.group_by("group", maintain_order=True)
    every = [list(part.select("op", "kind").iter_rows()) for _, part in by_group]
    return every if method == "signature" else every[:1]


def _check(
    signature: str, configuration: Configuration, groups: list[_Ops], base: str, runner: Runner
) -> None:
    for group in groups:
        if len(group) != len(configuration):
            raise MpqError(
                f"Configuration {', '.join(configuration)} has {len(configuration)} formats, {signature} {len(group)} ops."
            )
        pairs = zip(group, configuration, strict=True)
        lowered = [(op, kind, f) for (op, kind), f in pairs if f != base]
        if stuck := [op for op, kind, _ in lowered if kind == "other"]:
            raise MpqError(
                f"{stuck[0]} is no linear, no experts' product and none of attention's: it can only run in {base}."
            )
        for kind in get_args(Kind):
            runner.check([f for _, k, f in lowered if k == kind], kind)
