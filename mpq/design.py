"""Groups with more configurations than one can measure: measure a design, predict the rest with a stated error, and
measure what the solver then chooses, until everything chosen has been measured.

A parallel block has nine ops: 19,683 configurations in three formats. Within a group gains do not quite add up (products that
read the same activations share their cast, a fused attention is left or kept whole), so the model behind the prediction has a
term for each (op, format), one for each pair of neighbours that are both lowered, and one for lowering everything.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import polars as pl

from mpq.tables import table

Configuration: TypeAlias = tuple[str, ...]
Choices: TypeAlias = Sequence[Sequence[str]]  # for each op of a group the formats that it may take, base first
Wanted: TypeAlias = tuple[str, Configuration]  # signature, configuration
CANDIDATES = 20_000  # configurations of one group that the program may choose from
RIDGE = 1e-3


def choices_of(group: pl.DataFrame, formats: Mapping[str, Sequence[str]], base: str) -> list[tuple[str, ...]]:
    """The formats that each op of a group (rows of the groups table) may take; `formats` says what each kind may take."""
    return [tuple(dict.fromkeys((base, *formats.get(row["kind"], ())))) for row in group.sort("order").iter_rows(named=True)]


def design(choices: Choices, limit: int, seed: int = 0) -> list[Configuration]:
    """The configurations to measure, all-base first: all of them where there are at most `limit`, else every change of a
    single op, everything in each format, and random ones up to `limit`."""
    if math.prod(map(len, choices)) <= limit:
        return list(itertools.product(*choices))
    base = tuple(c[0] for c in choices)
    singles = [(*base[:i], f, *base[i + 1 :]) for i, c in enumerate(choices) for f in c[1:]]
    names = dict.fromkeys(f for c in choices for f in c[1:])
    # a format that not every op can take: the others in the last that they can
    whole = [tuple(f if f in c else c[-1] for c in choices) for f in names]
    chosen = dict.fromkeys([base, *singles, *whole])
    rng = random.Random(seed)
    while len(chosen) < limit:
        chosen[tuple(rng.choice(c) for c in choices)] = None
    return list(chosen)


def candidates(choices: Choices, measured: Iterable[Configuration], seed: int = 0) -> list[Configuration]:
    """What the program may choose from: every configuration, or where there are too many those measured and random ones."""
    if math.prod(map(len, choices)) <= CANDIDATES:
        return list(itertools.product(*choices))
    return list(dict.fromkeys([*measured, *design(choices, CANDIDATES, seed)]))


@dataclass(frozen=True)
class GainModel:
    """Gains (s) of a signature's configurations, fitted to those measured. `error_s` is the leave-one-out RMS error."""

    choices: tuple[tuple[str, ...], ...]
    weights: np.ndarray
    error_s: float

    @classmethod
    def fit(cls, choices: Choices, gains: Mapping[Configuration, float]) -> GainModel:
        """Ridge regression of the measured gains; all-base is zero by definition, so there is no constant."""
        fixed = tuple(tuple(c) for c in choices)
        x = np.array([_features(fixed, c) for c in gains])
        y = np.array(list(gains.values()))
        gram = x.T @ x + RIDGE * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, x.T @ y)
        hat = np.einsum("ij,ij->i", x, np.linalg.solve(gram, x.T).T)
        informed = hat < 1 - 1e-6  # left out, a row that alone decides a weight can tell nothing
        residual = (y - x @ weights)[informed] / (1 - hat[informed])
        return cls(fixed, weights, float(np.sqrt(np.mean(residual**2))) if informed.any() else math.inf)

    def predict(self, configurations: Sequence[Configuration]) -> np.ndarray:
        """Gains in seconds, (configurations,)."""
        return np.asarray(np.array([_features(self.choices, c) for c in configurations]) @ self.weights)


def _features(choices: tuple[tuple[str, ...], ...], configuration: Configuration) -> list[float]:
    lowered = [f != c[0] for f, c in zip(configuration, choices, strict=True)]
    each = [float(f == other) for f, c in zip(configuration, choices, strict=True) for other in c[1:]]
    pairs = [float(a and b) for a, b in itertools.pairwise(lowered)]
    return [*each, *pairs, float(all(low for low, c in zip(lowered, choices, strict=True) if len(c) > 1))]


def complete(timing: pl.DataFrame, choices: Mapping[str, Choices], base: str) -> pl.DataFrame:
    """The timing table with a row for each configuration that may be chosen and was not measured: `repeats` 0, its gain
    predicted, its interval two errors to each side. A signature measured in full stays as it is."""
    rows: list[dict[str, object]] = []
    for signature, per_op in choices.items():
        of = timing.filter(pl.col("signature") == signature)
        gains = {tuple(r["configuration"]): r["gain_s"] for r in of.iter_rows(named=True)}
        missing = [c for c in candidates(per_op, gains) if c not in gains]
        if not missing or of.is_empty():
            continue
        model = GainModel.fit(per_op, gains)
        like = of.row(0, named=True)
        base_s, n = float(of["base_ttft_s"].median()), like["instances"]  # type: ignore[arg-type]
        for configuration, gain in zip(missing, model.predict(missing), strict=True):
            rows.append(like | {
                "configuration": list(configuration), "repeats": 0, "base_ttft_s": base_s, "ttft_s": base_s - n * gain,
                "gain_s": gain, "gain_ci_low_s": gain - 2 * model.error_s, "gain_ci_high_s": gain + 2 * model.error_s,
                "disturbed": 0, "measured": None, "significant": abs(gain) > 2 * model.error_s,
            })  # fmt: skip
    return pl.concat([timing, table("timing", rows)], how="diagonal_relaxed") if rows else timing


def unmeasured(timing: pl.DataFrame, groups: pl.DataFrame, plans: Iterable[Mapping[str, str]], base: str) -> list[Wanted]:
    """The configurations that plans (op → format) put some group in, and that no row of `timing` has measured."""
    seen = {(s, tuple(c)) for s, c in timing.filter(pl.col("repeats") > 0).select("signature", "configuration").iter_rows()}
    members = [
        (signature, rows["op"].to_list())
        for (_, signature), rows in groups.sort("order").group_by(["group", "signature"], maintain_order=True)
    ]
    wanted = {(s, tuple(plan.get(op, base) for op in ops)): None for plan in plans for s, ops in members}
    return [w for w in wanted if w not in seen and set(w[1]) != {base}]


def refine(
    timing: pl.DataFrame, groups: pl.DataFrame, choices: Mapping[str, Choices], base: str, *,
    measure: Callable[[list[Wanted]], pl.DataFrame], solve: Callable[[pl.DataFrame], Sequence[Mapping[str, str]]], rounds: int = 8,
) -> tuple[pl.DataFrame, int]:  # fmt: skip
    """Solve, measure what was chosen and not yet measured, solve again, until everything chosen is measured or `rounds` are over.

    `solve` gives plans from a completed timing table, `measure` the timing rows of what is asked. Returns the measured rows and
    the number of rounds in which something was measured.
    """
    for done in range(rounds):
        wanted = unmeasured(timing, groups, solve(complete(timing, choices, base)), base)
        if not wanted:
            return timing, done
        timing = pl.concat([timing, measure(wanted)], how="diagonal_relaxed")
    return timing, rounds


def anchors(groups: pl.DataFrame, gains: pl.DataFrame, base: str) -> list[dict[str, str]]:
    """The whole plans (op → format) whose TTFT tells how groups help each other, whatever they do to the loss: every group
    in the configuration that gains most, and for each format as many ops in it as some configuration has."""
    rows = gains.sort("gain").select("group", "configuration", "gain").rows()
    fastest = {g: tuple(c) for g, c, _ in rows}
    chosen = [fastest]
    for name in sorted({f for _, c, _ in rows for f in c if f != base}):
        ranked = sorted(rows, key=lambda row: (row[1].count(name), row[1].count(base)))
        chosen.append({g: tuple(c) for g, c, _ in ranked})
    members = list(groups.sort("order").group_by(["group"], maintain_order=True).agg("op").iter_rows())
    plans = [{op: f for g, ops in members if g in best for op, f in zip(ops, best[g], strict=True)} for best in chosen]
    lowered = [plan for plan in plans if any(f != base for f in plan.values())]
    return [plan for i, plan in enumerate(lowered) if plan not in lowered[:i]]


def sums(groups: pl.DataFrame, gains: pl.DataFrame, plans: Iterable[Mapping[str, str]], base: str) -> list[float]:
    """For each plan the sum of its groups' gains. Raises KeyError for a configuration that the gains table lacks."""
    gain: dict[Any, float] = {(g, tuple(c)): v for g, c, v in gains.select("group", "configuration", "gain").iter_rows()}
    members = (
        groups.filter(pl.col("group").is_in(gains["group"].implode())).sort("order").group_by(["group"], maintain_order=True)
    )
    ops_of = list(members.agg("op").iter_rows())
    return [math.fsum(gain[g, tuple(plan.get(op, base) for op in ops)] for g, ops in ops_of) for plan in plans]


def half_widths(groups: pl.DataFrame, timing: pl.DataFrame, plans: Iterable[Mapping[str, str]], base: str) -> list[float]:
    """For each plan the half width (s) of the 95 % interval of its groups' summed gains, from the intervals of the timing table.

    One measurement that serves several groups of a signature errs in all of them alike; different ones err apart. Raises KeyError for a
    configuration that the table lacks.
    """
    half = {
        (r["signature"], tuple(r["configuration"])): (r["gain_ci_high_s"] - r["gain_ci_low_s"]) / 2
        for r in timing.iter_rows(named=True)
    }
    members = groups.filter(pl.col("signature").is_in(timing["signature"].unique().implode()))
    ops_of = [
        (signature, rows["op"].to_list())
        for (_, signature), rows in members.sort("order").group_by(["group", "signature"], maintain_order=True)
    ]
    out = []
    for plan in plans:
        chosen = Counter((signature, tuple(plan.get(op, base) for op in ops)) for signature, ops in ops_of)
        out.append(math.hypot(*(count * half[which] for which, count in chosen.items() if set(which[1]) != {base})))
    return out


def neighbours(groups: pl.DataFrame, formats: Mapping[str, str], base: str) -> float:
    """How many groups of a plan follow a lowered group and are lowered themselves; partly lowered ones count by their shares."""
    lowered = pl.col("op").replace_strict({op: f != base for op, f in formats.items()}, default=False, return_dtype=pl.Boolean)
    order = groups.group_by("group").agg(pl.col("order").min(), lowered.mean().alias("share")).sort("order")
    shares = order["share"].to_numpy()
    return float(shares[1:] @ shares[:-1])


def interaction(neighbours: Sequence[float], sums_s: Sequence[float], measured_s: Sequence[float]) -> float:
    """How groups help each other: the seconds that each pair of lowered neighbours gains beyond what the two gain alone.

    A base product leaves the caches cold for what follows, so lowering both gains more than lowering each. Least squares over
    measured plans, with the number of such pairs in each, the sum of its groups' gains, and what it gained; 0 where there are none.
    """
    pairs, excess = np.asarray(neighbours), np.asarray(measured_s) - np.asarray(sums_s)
    return float(excess @ pairs / (pairs @ pairs)) if pairs.any() else 0.0
