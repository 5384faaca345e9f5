"""What each configuration of each group gains, and what it costs in loss MSE and in KL divergence: the program's
coefficients (Sec. 2.3)."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import networkx as nx
import numpy as np
import polars as pl
from numpy.typing import NDArray

from mpq.errors import MpqError
from mpq.formats.scheme import mac_time, of_cache, of_kind
from mpq.program.constraints import Allowed
from mpq.program.costs import COSTS, Cost, Costs, added
from mpq.program.memory import STORED, Requests, bytes_of, cache_bytes_of, cached
from mpq.program.quadratic import solve_signed
from mpq.program.rows import Row, solve_within
from mpq.program.signed import Terms
from mpq.program.solver import Solution, SolverName, solve
from mpq.store.tables import table
from mpq.timing.answer import answers

log = logging.getLogger("mpq")
Gain: TypeAlias = Callable[[dict[str, Any], str], float]  # of an op (a row of groups) in a format
_PARTS = ("ttft_gain", "tpot_gain")
JOINED = 200_000  # configurations of groups that a tie joins
# what people are told of a column that is bounded: its name and unit
NAMES = {"loss_mse": ("loss MSE", "nats²"), "kl": ("KL", "nats per token")}


def gains_et(
    groups: pl.DataFrame,
    timing: pl.DataFrame,
    sensitivity: pl.DataFrame,
    base: str,
    noise_model: str,
    bound: str = "median",
    allowed: Allowed | None = None,
) -> pl.DataFrame:
    """IP-ET: seconds gained, measured for the group's signature (or, by the paper's way, for the group itself).

    `bound` says what of a gain counts: `median` (as measured), `lower` (its interval's lower end),
    `cautious` (the lower end where the interval includes zero), or `pooled` (what all of its
    signature's configurations say of it: design.complete). A configuration measured twice counts
    as it was the last time, unless pooled. What `allowed` rules out is left out, and groups that a
    tie joins are one, whose gain and loss add. Of times of whole answers the columns `ttft_gain` and
    `tpot_gain` (s) say what the first token gains, and each one after it. Raises MpqError where that leaves a group nothing,
    and for times that were measured beside another base.
    """
    costs = Costs(sensitivity, noise_model, base)
    if bound == "pooled" and "pooled_gain_s" not in timing.columns:
        raise MpqError(
            "The timing table has no pooled gains: expected what design.complete makes of it, or another bound."
        )
    _check_base(timing, base)
    measured: dict[str, dict[tuple[str, ...], tuple[float, ...]]] = {}
    more = _PARTS if answers(timing) else ()
    for row in timing.iter_rows(named=True):
        unsure = row["gain_ci_low_s"] <= 0 <= row["gain_ci_high_s"]
        counts = "pooled_gain_s" if bound == "pooled" else "gain_s"
        if bound == "lower" or (bound == "cautious" and unsure):
            counts = "gain_ci_low_s"
        gained = (row[counts], *(_parts(row, bound) if more else ()))
        measured.setdefault(row["signature"], {})[tuple(row["configuration"])] = gained
    parts: list[_Part] = []
    for group in _groups(groups):
        of_signature = measured.get(group["signature"])
        if not of_signature:
            raise MpqError(
                f"The timing table has no row for {group['signature']} (group {group['group']}): time that signature."
            )
        options = allowed.options(group["op"]) if allowed else None
        rows: dict[tuple[str, ...], Cost] = {}
        for formats, gained in of_signature.items():
            if options is None or formats in options:
                gain, *of_parts = (0.0 for _ in gained) if set(formats) == {base} else gained
                rows[formats] = (gain, *costs.of(group["op"], formats), *of_parts)
        if not rows:
            raise MpqError(
                f"The timing table has no configuration of {group['signature']} (group {group['group']}) "
                "that the constraints allow: time that signature with them."
            )
        parts.append(_Part(group["group"], tuple(group["op"]), rows))
    return _table("et", _joined(parts, allowed) if allowed else parts, more)


def _check_base(timing: pl.DataFrame, base: str) -> None:
    """Raise MpqError where what is all in `base` gains something: then gains were counted from another base."""
    all_base = pl.col("configuration").list.unique().list.join(" ") == base
    if timing.filter(all_base, pl.col("gain_s") != 0.0).height:
        raise MpqError(
            f"The timing table's gains are not counted from {base}, which gains something in it itself: "
            "give the base that was timed, or measure times beside this one."
        )


def _parts(row: Mapping[str, Any], bound: str) -> tuple[float, float]:
    """What a configuration gains of the time to the first token, and of each after it (s), as measured or pooled."""
    if bound != "pooled":
        return row["ttft_gain_s"], row["tpot_gain_s"]
    tokens = row["pooled_tpot_gain_s"]
    return row["pooled_gain_s"] - (row["output"] - 1) * tokens, tokens


@dataclass(frozen=True)
class _Part:
    """Ops decided together: each configuration's gain, and what it costs."""

    group: int
    ops: tuple[str, ...]
    rows: dict[tuple[str, ...], Cost]


def _joined(parts: Sequence[_Part], allowed: Allowed) -> list[_Part]:
    """The parts, those that a tie joins as one, numbered as the first of them."""
    of = {op: part.group for part in parts for op in part.ops}
    graph = nx.Graph()
    graph.add_nodes_from(part.group for part in parts)
    for together in allowed.decisions:
        nx.add_path(graph, [of[op] for op in together if op in of])
    by_group = {part.group: part for part in parts}
    join = functools.partial(_join, allowed=allowed)
    tied = (sorted(numbers) for numbers in nx.connected_components(graph))
    return [functools.reduce(join, (by_group[g] for g in numbers)) for numbers in tied]


def _join(one: _Part, other: _Part, allowed: Allowed) -> _Part:
    ops = (*one.ops, *other.ops)
    options = allowed.options(ops)
    if (count := len(one.rows) * len(other.rows)) > JOINED:
        raise MpqError(
            f"A tie joins groups with {count:,} configurations together "
            f"({one.ops[0]} … {other.ops[-1]}): tie fewer ops."
        )
    rows = {
        (*a, *b): added((worth, more))
        for a, worth in one.rows.items()
        for b, more in other.rows.items()
        if (*a, *b) in options
    }
    return _Part(one.group, ops, rows)


def gains_tt(
    groups: pl.DataFrame,
    sensitivity: pl.DataFrame,
    formats: Sequence[str],
    base: str,
    noise_model: str,
    allowed: Allowed | None = None,
) -> pl.DataFrame:
    """IP-TT: BF16 MACs gained, Δ_f · MACs (eq. 28). It adds up over ops, so every op, or tie of ops, is a group of its
    own: the same optimum as with Fⁿ configurations a group, from F. `allowed` says what each may take, else `formats`."""
    ops = groups.filter(pl.col("kind") != "other")
    costs = Costs(sensitivity, noise_model, base)

    def gain(op: dict[str, Any], name: str) -> float:
        return float((mac_time(base, base) - mac_time(name, base)) * op["macs"])

    return _by_decision("tt", ops, gain, costs, formats, allowed)


def gains_m(
    groups: pl.DataFrame,
    sensitivity: pl.DataFrame,
    formats: Sequence[str],
    base: str,
    noise_model: str,
    allowed: Allowed | None = None,
    requests: Requests | None = None,
) -> pl.DataFrame:
    """IP-M: bytes of weights gained (eqs. 29–30), scales counted; linears and experts only, every op, or tie of ops, its own
    group.

    `allowed` says what each may take, else `formats`. A weight that is tied to the embedding stays
    there in base: lowered, it is a copy more and gains less than nothing. Where a scheme of the cache is among the formats, what
    `requests` keep of keys and values counts too, and columns more say what it takes: `cache_bytes`, `base_cache_bytes`.
    Raises MpqError for such a scheme without `requests`.
    """
    costs, caches = Costs(sensitivity, noise_model, base), of_cache(formats)
    if not caches:
        ops = groups.filter(pl.col("kind").is_in(STORED))
        return _by_decision("m", ops, _bytes_gained(base), costs, formats, allowed)
    if requests is None:
        raise MpqError(
            f"{caches[0]} gains bytes of the cache, which hang on how many tokens are in it: say of which requests (workload)."
        )
    held = cached(groups)
    ops = groups.filter(pl.col("kind").is_in(STORED) | pl.col("op").is_in(held))

    def cache(op: dict[str, Any], name: str) -> float:
        return cache_bytes_of(op, name, base, requests) if op["op"] in held else 0.0

    def gain(op: dict[str, Any], name: str) -> float:
        return _bytes_gained(base)(op, name) + cache(op, base) - cache(op, name)

    more = {"cache_bytes": cache, "base_cache_bytes": lambda op, name: cache(op, base)}
    return _by_decision("m", ops, gain, costs, formats, allowed, more)


def _bytes_gained(base: str) -> Gain:
    """Bytes of weights that an op gains in a format."""
    return lambda op, name: bytes_of(op, base, base) - bytes_of(op, name, base)


def _by_decision(
    objective: str,
    ops: pl.DataFrame,
    gain: Gain,
    costs: Costs,
    formats: Sequence[str],
    allowed: Allowed | None,
    more: Mapping[str, Gain] = MappingProxyType({}),
) -> pl.DataFrame:
    """Gains that add up over ops: a group for each decision, numbered by its first op's `order`; `more` are further columns."""
    rows = {row["op"]: row for row in ops.sort("order").iter_rows(named=True)}
    free = tuple(dict.fromkeys((costs.base, *formats)))
    decisions = allowed.of(rows).decisions if allowed else _untied(rows, formats)

    def worth(op: str, f: str) -> Cost:
        further = (value(rows[op], f) for value in more.values())
        return gain(rows[op], f), *costs.of((op,), (f,)), *further

    parts = []
    for together in decisions:
        first = rows[together[0]]
        kind = first["kind"]
        if allowed:
            may = allowed.formats[first["op"]]
        elif objective == "m" and kind == "bgemm":  # of memory, these have their cache alone
            may = tuple(dict.fromkeys((costs.base, *of_cache(free))))
        else:
            may = tuple(dict.fromkeys((costs.base, *of_kind(kind, free))))
        options = {(f,) * len(together): added([worth(op, f) for op in together]) for f in may}
        parts.append(_Part(first["order"], tuple(together), options))
    return _table(objective, parts, tuple(more))


def _untied(rows: Mapping[str, Mapping[str, Any]], formats: Sequence[str]) -> list[tuple[str, ...]]:
    """The decisions where nothing is constrained: each op by itself, or the products of a layer whose cache is decided together."""
    decisions: dict[str, tuple[str, ...]] = {}
    for op, row in rows.items():
        pair = row["kind"] == "bgemm" and of_cache(formats)
        name = op.rpartition(".")[0] if pair else op
        decisions[name] = (*decisions.get(name, ()), op)
    return list(decisions.values())


def _groups(groups: pl.DataFrame) -> list[dict[str, Any]]:
    ordered = groups.sort("order").group_by("group", "signature", maintain_order=True)
    return list(ordered.agg("op").iter_rows(named=True))


def _table(objective: str, parts: Sequence[_Part], more: Sequence[str] = ()) -> pl.DataFrame:
    """The gains table, and a column more: `ops`, which a configuration gives formats to, in its order; and those that `more`
    names, of what rows hold behind gain and costs.

    Configurations in which an op overflows are left out with a warning. Raises MpqError where that leaves ops none.
    """
    found: list[tuple[_Part, tuple[str, ...], Cost]] = []
    for part in parts:
        finite = {f: worth for f, worth in part.rows.items() if math.inf not in worth}
        if len(finite) < len(part.rows):
            lost = sorted({f for c in part.rows.keys() - finite.keys() for f in c})
            log.warning("%s … in %s: values overflow, left out.", part.ops[0], " or ".join(lost))
        if not finite:
            raise MpqError(
                f"{', '.join(part.ops[:4])} overflow in all that the constraints leave them: allow another format."
            )
        found += [(part, formats, worth) for formats, worth in finite.items()]
    names = ("gain", *COSTS, *more)
    rows: list[dict[str, object]] = [
        {"objective": objective, "group": part.group, "configuration": list(formats)}
        | dict(zip(names, worth, strict=True))
        for part, formats, worth in found
    ]
    ops = pl.Series("ops", [part.ops for part, *_ in found], dtype=pl.List(pl.String))
    behind = [pl.Series(name, [row[name] for row in rows], dtype=pl.Float64) for name in more]
    return table("gains", rows).with_columns(ops, *behind)


def solve_table(
    gains: pl.DataFrame,
    budget: float | Mapping[str, float],
    solver: SolverName = "auto",
    bounds: Sequence[Row] = (),
    terms: Terms | None = None,
) -> tuple[pl.DataFrame, Solution]:
    """The chosen row of each group of a gains table, and the solution.

    `budget` bounds the summed loss MSE (nats²), or each of the columns that it names (loss_mse, kl); `bounds` hold beside it.
    With the rows' `terms` the loss MSE is that with signs (signed.py), in place of the sum. Raises MpqError for a table that
    is no program, NoPlan where no plan keeps the bounds.
    """
    budgets = budget if isinstance(budget, Mapping) else {"loss_mse": budget}
    group = _checked(gains, tuple(budgets))
    gain = gains["gain"].to_numpy()
    summed = {c: limit for c, limit in budgets.items() if terms is None or c != "loss_mse"}
    rows = [*(cost_row(gains, column, limit) for column, limit in summed.items()), *bounds]
    if terms is not None and "loss_mse" in budgets:
        solution = solve_signed(group, gain, terms, budgets["loss_mse"], rows, solver=solver)
        return gains[list(solution.chosen)], solution
    if len(rows) == 1 and "loss_mse" in budgets:
        solution = solve(group, gain, rows[0].values, rows[0].limit, solver=solver)
    else:
        solution = solve_within(group, gain, rows, solver=solver)
    return gains[list(solution.chosen)], solution


def least_cost(
    gains: pl.DataFrame, bounds: Sequence[Row], solver: SolverName = "auto"
) -> tuple[pl.DataFrame, Solution]:
    """The program turned round: of each group the row that makes the summed KL smallest while `bounds` hold; where KL was
    not measured for every row, the summed loss MSE.

    The solution's gain and bound are costs below zero. Raises as solve_table.
    """
    column = cost_known(gains)
    group = _checked(gains, (column,))
    solution = solve_within(group, -gains[column].to_numpy(), bounds, solver=solver)
    return gains[list(solution.chosen)], solution


def cost_known(gains: pl.DataFrame) -> str:
    """The column that says best what a plan costs: kl where every row has it, else loss_mse."""
    return "kl" if "kl" in gains.columns and not gains["kl"].null_count() else "loss_mse"


def cost_row(gains: pl.DataFrame, column: str, limit: float) -> Row:
    """The bound on a column of the gains table as a row of the program."""
    name, unit = NAMES[column]
    return Row(name, gains[column].to_numpy(), limit, unit)


def _checked(gains: pl.DataFrame, costs: tuple[str, ...]) -> NDArray[np.int64]:
    """The groups' numbers. Raises MpqError for a table that is no program with these columns as costs."""
    needed = ("group", "configuration", "gain", *costs)
    missing = [c for c in needed if c not in gains.columns]
    if missing:
        raise MpqError(f"The gains table lacks {', '.join(missing)}: expected {', '.join(needed)}.")
    for name in ("group", "gain", *costs):
        kind = gains[name].dtype
        if not (kind.is_float() or kind.is_integer()) or kind in (pl.Int128, pl.UInt128):
            raise MpqError(f"The gains table has the column {name} as {kind}: expected numbers.")
        if not gains[name].is_finite().fill_null(False).all():
            raise MpqError(
                f"The gains table has a {name} that is no number (empty, NaN or infinite): expected one in every row."
            )
        if not math.isfinite(gains[name].cast(pl.Float64).abs().sum()):
            raise MpqError(
                f"The gains table has values of {name} whose sum no float holds: check its unit."
            )
    if gains.is_empty():
        raise MpqError("The gains table is empty: expected a row for each group and configuration.")
    if "objective" in gains.columns and gains["objective"].n_unique() > 1:
        raise MpqError(
            f"The gains table holds several objectives ({', '.join(map(str, gains['objective'].unique()))}): choose one with --objective."
        )
    if gains.select("group", "configuration").is_duplicated().any():
        raise MpqError(
            "The gains table has a configuration of a group twice: keep one row for each, since which counts cannot be told."
        )
    return gains["group"].rank("dense").to_numpy().astype(np.int64) - 1
