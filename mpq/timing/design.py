"""Groups with more configurations than one can measure: measure a design, predict the rest with a stated error, and
measure what the solver then chooses, until everything chosen has been measured.

A parallel block has nine ops: 19,683 configurations in three formats. What predicts them is gain_model.py.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import polars as pl

from mpq.store.tables import table, upgraded
from mpq.timing.answer import answers, base_answer_s, predicted_parts
from mpq.timing.gain_model import Configuration, GainModel
from mpq.timing.options import Alternatives, Options, alternatives
from mpq.timing.pairs import NORMAL_95, few

Wanted: TypeAlias = tuple[str, Configuration]  # signature, configuration
Timed = TypeVar("Timed")
POOLED = 1024  # so many measured gains are not pooled, which takes the cube of their number
CANDIDATES = 20_000  # configurations of one group that the program may choose from


def choices_of(
    group: pl.DataFrame, formats: Mapping[str, Sequence[str]], base: str
) -> list[tuple[str, ...]]:
    """The formats that each op of a group (rows of the groups table) may take; `formats` says what each kind may take."""
    return [
        tuple(dict.fromkeys((base, *formats.get(row["kind"], ()))))
        for row in group.sort("order").iter_rows(named=True)
    ]


def design(choices: Alternatives, limit: int, seed: int = 0) -> list[Configuration]:
    """The configurations to measure, all-base first: all of them where there are at most `limit`, else every change of a
    single op (or of tied ones together), everything in each format, and random ones up to `limit`."""
    return _together(_design(options, limit, seed) for options in alternatives(choices))


def _design(options: Options, limit: int, seed: int) -> list[Configuration]:
    if options.count <= limit:
        return list(options)
    chosen = dict.fromkeys([options.first(), *options.changes(), *options.whole()])
    rng = random.Random(seed)
    while len(chosen) < limit:
        chosen[options.draw(rng)] = None
    return list(chosen)


def _together(parts: Iterable[Iterable[Configuration]]) -> list[Configuration]:
    return list(dict.fromkeys(itertools.chain.from_iterable(parts)))


def candidates(
    choices: Alternatives, measured: Iterable[Configuration], seed: int = 0
) -> list[Configuration]:
    """What the program may choose from: every configuration, or where there are too many those measured and random ones."""
    known, parts = list(measured), list[Iterable[Configuration]]()
    for options in alternatives(choices):
        few_enough = options.count <= CANDIDATES
        some = (c for c in known if c in options)
        parts.append(options if few_enough else [*some, *_design(options, CANDIDATES, seed)])
    return _together(parts)


def complete(timing: pl.DataFrame, choices: Mapping[str, Alternatives], base: str) -> pl.DataFrame:
    """The timing table with a row for each configuration that may be chosen and was not measured: `predicted`, its gain
    and its interval that of the prediction (95 %). Measured rows stay as they are; what `choices` does not allow is left out.

    The further columns `pooled_gain_s` and `pooled_error_s` are what all measured configurations of the signature together say of a
    row's gain (gain_model.py), and its standard error: of many noisy gains the largest is too large, and a program looks for the largest.
    Of answers of several tokens `pooled_tpot_gain_s` is what they say of the gain of each token after the first.
    """
    timing, parts = upgraded("timing", timing), list[pl.DataFrame]()
    for signature, of_signature in choices.items():
        options = alternatives(of_signature)
        of = timing.filter(pl.col("signature") == signature)
        allowed = [any(c in o for o in options) for c in of["configuration"].to_list()]
        if not (of := of.filter(pl.Series(allowed, dtype=pl.Boolean))).is_empty():
            parts.append(_completed(of, options, base))
    return pl.concat(parts, how="diagonal_relaxed") if parts else timing


def _completed(of: pl.DataFrame, options: Sequence[Options], base: str) -> pl.DataFrame:
    """The measured rows of one signature, then those of the configurations that nobody measured; see complete."""
    per_op, errors = _per_op(options, base), standard_errors(of, base)
    measured = [tuple(c) for c in of["configuration"]]
    seen = set(measured)
    missing = [c for c in candidates(options, measured) if c not in seen]
    alone = sum(len(c) > 1 for c in per_op) < 2  # one op's formats tell nothing of each other
    if not missing and (alone or of.height > POOLED):
        as_measured = {"pooled_gain_s": "gain_s"}
        as_measured |= {"pooled_tpot_gain_s": "tpot_gain_s"} if answers(of) else {}
        pooled_error = pl.Series("pooled_error_s", errors)
        return of.with_columns(pooled_error, **{k: pl.col(c) for k, c in as_measured.items()})
    model = GainModel.fit(per_op, measured, of["gain_s"].to_list(), errors.tolist())
    every, new = [*measured, *missing], slice(of.height, None)
    gain, error = model.predict(every)
    pooled, first, parts_of_new = {"pooled_gain_s": gain, "pooled_error_s": error}, gain, []
    if answers(of):
        tokens = pooled["pooled_tpot_gain_s"] = model.parts(every, of["tpot_gain_s"].to_list())
        parts_of_new = [predicted_parts(of, gain[new], tokens[new])]
        first = gain - (of["output"][0] - 1) * tokens
    like, base_s = of.row(0, named=True), float(of["base_ttft_s"].median())  # type: ignore[arg-type]
    columns = (of_all[new].tolist() for of_all in (gain, error, first))
    rows = [
        like
        | {
            "configuration": list(c),
            "repeats": 0,
            "base_ttft_s": base_s,
            "ttft_s": base_s - like["instances"] * of_first,
            "gain_s": g,
            "gain_ci_low_s": g - NORMAL_95 * e,
            "gain_ci_high_s": g + NORMAL_95 * e,
            "disturbed": 0,
            "order_measured": None,
            "predicted": True,
            "significant": abs(g) > NORMAL_95 * e,
        }
        for c, g, e, of_first in zip(missing, *columns, strict=True)
    ]
    unmeasured_rows = pl.concat([table("timing", rows), *parts_of_new], how="horizontal")
    both = pl.concat([of, unmeasured_rows], how="diagonal_relaxed")
    return both.with_columns(pl.Series(name, of_all) for name, of_all in pooled.items())


def _per_op(options: Iterable[Options], base: str) -> list[tuple[str, ...]]:
    """For each op the formats that some option lets it take, and base before them: what gains are counted from."""
    taken: dict[int, dict[str, None]] = {}
    for option in options:
        for formats, places in zip(option.formats, option.places, strict=True):
            for i in places:
                taken.setdefault(i, {base: None}).update(dict.fromkeys(formats))
    return [tuple(taken[i]) for i in sorted(taken)]


def standard_errors(timing: pl.DataFrame, base: str) -> np.ndarray:
    """Of each row's gain (s), from its interval. With few pairs an interval may be narrow by luck: no error is taken for less than half
    of the usual one. All-base gains nothing for certain."""
    half = ((timing["gain_ci_high_s"] - timing["gain_ci_low_s"]) / 2).to_numpy()
    errors = half / (NORMAL_95 * few(timing["repeats"].to_numpy()))
    lowered = np.array([set(c) != {base} for c in timing["configuration"]])
    least = np.median(errors[lowered]) / 2 if lowered.any() else 0.0
    return np.where(lowered, np.maximum(errors, least), 0.0)


def unmeasured(
    timing: pl.DataFrame, groups: pl.DataFrame, plans: Iterable[Mapping[str, str]], base: str
) -> list[Wanted]:
    """The configurations that plans (op → format) put some group in, and that no row of `timing` has measured."""
    measured = upgraded("timing", timing).filter(~pl.col("predicted"))
    rows = measured.select("signature", "configuration").iter_rows()
    seen = {(signature, tuple(c)) for signature, c in rows}
    members = _ops_of_groups(groups)
    wanted = dict.fromkeys(
        (signature, tuple(plan.get(op, base) for op in ops))
        for plan in plans
        for signature, ops in members
    )
    return [w for w in wanted if w not in seen and set(w[1]) != {base}]


def _ops_of_groups(groups: pl.DataFrame) -> list[tuple[str, list[str]]]:
    """Each group's signature and ops, in the model's order."""
    by_group = groups.sort("order").group_by(["group", "signature"], maintain_order=True)
    return [(str(signature), rows["op"].to_list()) for (_, signature), rows in by_group]


def uncertain(
    timing: pl.DataFrame,
    choices: Mapping[str, Alternatives],
    base: str,
    target: float,
    at_most: int,
) -> list[Wanted]:
    """The unmeasured configurations whose predicted gain is least certain, at most so many of each signature, worst first.

    None whose gain, of all groups of the signature, is known to ± `target` of base's time (95 %). Measured next, these say more
    than random ones: of 243 configurations 33 chosen so predict as well as 43 at random (docs/log.md).
    """
    wanted: list[Wanted] = []
    for signature, per_op in choices.items():
        full = complete(timing, {signature: per_op}, base)
        if full.is_empty() or "pooled_error_s" not in full.columns:
            continue
        enough_s = target * base_answer_s(full) / NORMAL_95
        unsure = (
            full.filter(pl.col("predicted"))
            .with_columns(error_s=pl.col("pooled_error_s") * pl.col("instances"))
            .filter(pl.col("error_s") > enough_s)
            .sort("error_s", descending=True, maintain_order=True)
        )
        wanted += [(signature, tuple(c)) for c in unsure["configuration"].head(at_most)]
    return wanted


def refine(
    timed: Timed,
    chosen: Callable[[Timed], list[Wanted]],
    measure: Callable[[Timed, list[Wanted]], Timed],
    rounds: int,
) -> tuple[Timed, int]:
    """Solve, measure what was chosen and not yet measured, solve again, until everything chosen is measured or `rounds` are over.

    `timed` is what has been measured, in whatever form its owner holds it; `chosen` solves and says what of the plan is `unmeasured`;
    `measure` returns `timed` with that in it. Returns what was measured, and the rounds in which something was.
    """
    for done in range(rounds):
        wanted = chosen(timed)
        if not wanted:
            return timed, done
        timed = measure(timed, wanted)
    return timed, rounds


def members(groups: pl.DataFrame, gains: pl.DataFrame) -> dict[int, list[str]]:
    """The ops that each group of a gains table decides, in the order of its configurations.

    As its column `ops` says; without one, for et the group's ops, else the one op of that `order`.
    """
    if gains.schema.get("ops") == pl.List(pl.String):
        return dict(gains.unique("group", maintain_order=True).select("group", "ops").iter_rows())
    ordered = groups.sort("order")
    if "objective" not in gains.columns or gains["objective"][0] == "et":
        kept = ordered.filter(pl.col("group").is_in(gains["group"].implode()))
        return dict(kept.group_by("group", maintain_order=True).agg("op").iter_rows())
    return {order: [op] for order, op in ordered.select("order", "op").iter_rows()}


def anchors(groups: pl.DataFrame, gains: pl.DataFrame, base: str) -> list[dict[str, str]]:
    """The whole plans (op → format) whose TTFT tells how groups help each other, whatever they do to the loss: every group
    in the configuration that gains most, and for each format as many ops in it as some configuration has."""
    rows = gains.sort("gain").select("group", "configuration", "gain").rows()
    fastest = {g: tuple(c) for g, c, _ in rows}
    chosen = [fastest]
    for name in sorted({f for _, c, _ in rows for f in c if f != base}):
        ranked = sorted(rows, key=lambda row: (row[1].count(name), row[1].count(base)))
        chosen.append({g: tuple(c) for g, c, _ in ranked})
    of = members(groups, gains)
    plans = [
        {op: f for g, c in best.items() for op, f in zip(of[g], c, strict=True)} for best in chosen
    ]
    lowered = [plan for plan in plans if any(f != base for f in plan.values())]
    return [plan for i, plan in enumerate(lowered) if plan not in lowered[:i]]


def sums(
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    plans: Iterable[Mapping[str, str]],
    base: str,
    column: str = "gain",
) -> list[float]:
    """For each plan the sum of its groups' gains, or of another column. Raises KeyError for a configuration that the gains table lacks."""
    gain: dict[Any, float] = {
        (g, tuple(c)): v for g, c, v in gains.select("group", "configuration", column).iter_rows()
    }
    of = members(groups, gains)
    return [
        math.fsum(gain[g, tuple(plan.get(op, base) for op in ops)] for g, ops in of.items())
        for plan in plans
    ]


def half_widths(
    groups: pl.DataFrame, timing: pl.DataFrame, plans: Iterable[Mapping[str, str]], base: str
) -> list[float]:
    """For each plan the half width (s) of the 95 % interval of its groups' summed gains, from the intervals of the timing table:
    of gains as measured. Pooled ones err less.

    One measurement that serves several groups of a signature errs in all of them alike; different ones err apart. Raises KeyError for a
    configuration that the table lacks.
    """
    half = {
        (r["signature"], tuple(r["configuration"])): (r["gain_ci_high_s"] - r["gain_ci_low_s"]) / 2
        for r in timing.iter_rows(named=True)
    }
    timed = groups.filter(pl.col("signature").is_in(timing["signature"].unique().implode()))
    ops_of, out = _ops_of_groups(timed), []
    for plan in plans:
        chosen = Counter((s, tuple(plan.get(op, base) for op in ops)) for s, ops in ops_of)
        lowered = {which: count for which, count in chosen.items() if set(which[1]) != {base}}
        out.append(math.hypot(*(count * half[which] for which, count in lowered.items())))
    return out


def neighbours(groups: pl.DataFrame, formats: Mapping[str, str], base: str) -> float:
    """How many groups of a plan are in the same lowered format as the group before them; partly lowered ones count by their shares.

    Of two formats in a row each meets what a base product would have left it, so they do not count.
    """
    named = pl.col("op").replace_strict(dict(formats), default=base, return_dtype=pl.String)
    lowered = sorted({f for f in formats.values() if f != base})
    shares = (
        groups.group_by("group")
        .agg(pl.col("order").min(), *((named == f).mean().alias(f) for f in lowered))
        .sort("order")
    )
    of = shares.select(lowered).to_numpy()
    return float((of[1:] * of[:-1]).sum())


def interaction(
    neighbours: Sequence[float], sums_s: Sequence[float], measured_s: Sequence[float]
) -> float:
    """How groups help each other: the seconds that each pair of lowered neighbours gains beyond what the two gain alone.

    A base product leaves the caches cold for what follows, so lowering both gains more than lowering each. Least squares over
    measured plans, with the number of such pairs in each, the sum of its groups' gains, and what it gained; 0 where there are none.
    """
    pairs, excess = np.asarray(neighbours), np.asarray(measured_s) - np.asarray(sums_s)
    return float(excess @ pairs / (pairs @ pairs)) if pairs.any() else 0.0
