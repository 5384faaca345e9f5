"""The paper's baselines: ops lowered in random or in model order until the bound is met (Sec. 3)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping

from mpq.formats.scheme import get_scheme, mac_time
from mpq.program.choice import Chosen, Rows, total_of
from mpq.program.gains import NAMES
from mpq.program.solver import NoPlan, no_plan


def _decisions(options: Rows) -> list[tuple[int, ...]]:
    """The places of a group that take one format in all its configurations: one op, or tied ones."""
    together: dict[tuple[str, ...], list[int]] = {}
    for i, taken in enumerate(zip(*options, strict=True)):
        together.setdefault(taken, []).append(i)
    return [tuple(places) for places in together.values()]


def walk(
    strategy: str,
    options: Mapping[int, Rows],
    base: str,
    budgets: Mapping[str, float],
    seed: int,
    keeps: Callable[[Chosen], bool] | None = None,
) -> Chosen:
    """Lower op after op, in `random` order or the model's (`prefix`), each to the format that is fastest in theory and keeps
    the sums of the columns of `budgets` below them, and what `keeps` tells of the whole, until one fits in none (Sec. 3).

    Raises NoPlan where what costs the least is over a budget.
    """
    # base, or where that is ruled out what costs the least
    chosen = {group: _cheapest(of, base, budgets) for group, of in options.items()}
    for column, budget in budgets.items():
        if (least := total_of(options, chosen, column)) > budget:
            name, unit = NAMES[column]
            raise no_plan(budget, least, f"{unit} of {name}")
    if keeps and not keeps(chosen):
        raise NoPlan(
            "The least costly configuration of every group is over the bound on the loss MSE: raise it."
        )
    places = [(group, of) for group in options for of in _decisions(options[group])]
    if strategy == "random":
        random.Random(seed).shuffle(places)
    for group, of in places:
        row, others = options[group], {g: c for g, c in chosen.items() if g != group}
        lowered = (
            tuple(f if i in of else g for i, g in enumerate(chosen[group]))
            for f in _by_speed(row, of[0], base)
        )
        candidates = [c for c in lowered if c in row]
        if not candidates:
            continue  # an op that cannot be lowered stands in nobody's way
        left = {column: b - total_of(options, others, column) for column, b in budgets.items()}
        fitting = (c for c in candidates if all(row[c][column] <= b for column, b in left.items()))
        taken = next((c for c in fitting if not keeps or keeps({**others, group: c})), None)
        if taken is None:
            break
        chosen[group] = taken
    return chosen


def _cheapest(of: Rows, base: str, columns: Iterable[str]) -> tuple[str, ...]:
    """The configuration that is all base, else the one that costs least in the first of the columns, then in the next."""
    return min(of, key=lambda c: (c.count(base) < len(c), *(of[c][column] for column in columns)))


def _by_speed(options: Rows, i: int, base: str) -> list[str]:
    names = {c[i] for c in options} - {base}

    def order(name: str) -> tuple[float, float, int, str]:
        scheme = get_scheme(name)
        return mac_time(name, base), scheme.bits, -scheme.weights.mantissa_bits, name

    return sorted(names, key=order)
