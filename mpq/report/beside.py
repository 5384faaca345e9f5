"""Other tools' plans beside a run's own: KL against size, counted as the others' table counts it.

The table has a row a plan: `tool`, `kl` as measured (nats per token), and one of

- `weight_bytes`: bytes of all linears and experts, scales counted;
- `effective_bits`: the same as mean bits a weight;
- `bits`: mean bits a weight of the linears but the head, as ModelOpt and auto-round count and
  bench/peers/compare.py writes them: a block's scale counts, a row's does not, and base is 16 bits
  whatever it runs in.

It may have `case`, what the tools were asked for: each case is a panel. By `fingerprint`,
`checkpoint` and `base`, where it has them, plans of another model are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

from mpq.errors import MpqError
from mpq.formats.scheme import get_scheme
from mpq.program.bounds import bound_rows
from mpq.program.gains import cost_known, least_cost
from mpq.program.memory import STORED, bytes_of, weights_of
from mpq.program.rows import Row
from mpq.program.signed import choices_of
from mpq.program.solver import NoPlan
from mpq.program.strategies import head_of
from mpq.report.pareto import Pareto, pareto_of
from mpq.report.results import KEYS, OBJECTIVES, Tables, base_of, plan_results, table_of
from mpq.report.runs import bounds_of
from mpq.report.sheets import Sheet
from mpq.spec import BoundsSpec

BASE_BITS = 16.0  # what a tool leaves alone counts as
TEXTS = ("tool", "case", "fingerprint", "checkpoint", "base")
BITS = (1.0, 33.0)  # that a weight can take: FP32, and a row's scale
POINTS = 60


class Count(NamedTuple):
    """A column that sizes are told in, as it is shown: name, unit, factor."""

    name: str
    unit: str
    scale: float


COUNTS = {
    "weight_bytes": Count("Weights", "MB", 1e-6),
    "effective_bits": Count("Effective bits", "a weight", 1.0),
    "bits": Count("Bits", "a weight of the linears but the head", 1.0),
}


@dataclass(frozen=True)
class Beside:
    """Plans by `size`, in the unit of `count`, and `kl` (nats per token).

    `others` have a tool and a case, and `own_kl`, the predicted KL of the run's own plan of at most
    that size; `measured` are the run's own plans, as measured, and `frontier` all that its formats
    give, as predicted. `matched` says by what the others are known to be of this model.
    """

    count: str
    others: pl.DataFrame
    measured: pl.DataFrame
    frontier: pl.DataFrame
    matched: str

    @property
    def sheet(self) -> Sheet:
        """Every plan of the others, and what the run's own of that size costs."""
        count = COUNTS[self.count]
        return Sheet(
            "beside",
            "Plans of other tools as their table has them, and by prediction the run's own plan of at most that size; "
            "– where its formats give none so small.",
            [
                ("Tool", "tool", ""),
                ("Case", "case", ""),
                (f"{count.name} ({count.unit})", "shown", "number"),
                ("KL, measured (nats per token)", "kl", "sci"),
                ("this run's, predicted", "own_kl", "sci"),
            ],
            self.others.with_columns(shown=pl.col("size") * count.scale).to_dicts(),
        )


class _Sizes:
    """What each op adds to a plan's size in each format, as a column counts it."""

    def __init__(self, count: str, groups: pl.DataFrame, base: str) -> None:
        self.base, self._count = base, count
        self._ops = {op["op"]: op for op in groups.iter_rows(named=True)}
        self._head = head_of(groups)
        inner = groups.filter(pl.col("kind").is_in(STORED), pl.col("op").ne_missing(self._head))
        counted = int(inner["parameters"].sum()) if count == "bits" else weights_of(groups)
        self.weights = max(1, counted)

    def of(self, name: str, fmt: str) -> float:
        """What one op adds."""
        op = self._ops[name]
        if self._count != "bits":
            size = bytes_of(op, fmt, self.base)
            return size if self._count == "weight_bytes" else 8 * size / self.weights
        if op["kind"] not in STORED or name == self._head:
            return 0.0
        bits = BASE_BITS if fmt == self.base else min(BASE_BITS, get_scheme(fmt).bits)
        return bits * float(op["parameters"]) / self.weights

    def stores(self, name: str) -> bool:
        """Whether an op has weights."""
        return name in self._ops and self._ops[name]["kind"] in STORED

    def saved(self, formats: Mapping[str, str]) -> float:
        """By how much ops in these formats are smaller than in base."""
        return math.fsum(self.of(op, self.base) - self.of(op, f) for op, f in formats.items())

    @property
    def in_base(self) -> float:
        """The size of the model in base."""
        return math.fsum(self.of(op, self.base) for op in self._ops)


def beside(frame: pl.DataFrame, file: str, tables: Tables, facts: Mapping[str, str]) -> Beside:
    """The plans of a table, called `file`, beside those of a run.

    Raises MpqError for a table that is none of such plans, or of another checkpoint or base, and
    for a run without KL.
    """
    count = _count_of(frame, file)
    rows, matched = _of_this_model(frame, file, facts)
    base, groups = base_of(tables, facts), table_of(tables, "groups")
    sizes = _Sizes(count, groups, base)
    _check_values(rows, file, count, 8 / sizes.weights if count == "weight_bytes" else 1.0)
    objective, gains = _gains_with_kl(tables)
    smaller = [sizes.saved(choice) for choice in choices_of(groups, gains)]
    bounds = bounds_of(facts)
    found = pareto_of(
        {**tables, "gains": gains.with_columns(gain=pl.Series(smaller))},
        base,
        objective=objective,
        cost="kl",
        points=POINTS,
        bounds=bounds,
    )
    frontier = pl.DataFrame(
        [(sizes.in_base - point.gain, point.cost) for point in found.points],
        schema={"size": pl.Float64, "kl": pl.Float64},
        orient="row",
    ).sort("size")
    case = pl.col("case").fill_null("") if "case" in rows.columns else pl.lit("")
    others = rows.select(
        "tool",
        case=case,
        size=pl.col(count).cast(pl.Float64),
        kl=pl.col("kl").cast(pl.Float64),
    )
    own = {size: _least_kl(found, bounds, size, sizes.in_base) for size in others["size"].unique()}
    others = others.with_columns(own_kl=pl.col("size").replace_strict(own, return_dtype=pl.Float64))
    measured = _measured(tables, objective, sizes)
    return Beside(count, others, measured, frontier, matched)


def _least_kl(
    found: Pareto, bounds: BoundsSpec | None, most: float, in_base: float
) -> float | None:
    """The smallest KL, as predicted, of the run's plans of at most that size; None where there is none so small.

    Solved for this size: the points of the frontier are fewer than its plans.
    """
    size = Row("size", -found.gains["gain"].to_numpy(), most * (1 + 1e-9) - in_base)
    rows = bound_rows(found.gains, found.groups, bounds, found.base) if bounds else []
    try:
        return -least_cost(found.gains, [size, *rows])[1].gain
    except NoPlan:
        return None


def _count_of(frame: pl.DataFrame, file: str) -> str:
    """The column that sizes are told in. Raises MpqError for a table that is none of plans."""
    count = next((c for c in COUNTS if c in frame.columns), "")
    lacks = [c for c in ("tool", "kl") if c not in frame.columns]
    lacks += [] if count else [f"one of {', '.join(COUNTS)}"]
    if lacks:
        raise MpqError(
            f"{file} lacks {' and '.join(lacks)}: expected a row for each plan of another tool, with tool, kl (nats per token) "
            "and its size."
        )
    if frame.is_empty():
        raise MpqError(f"{file} has no rows: expected one for each plan of another tool.")
    for column in {*TEXTS, "kl", count} & set(frame.columns):
        dtype = frame[column].dtype
        if not (dtype in (pl.String, pl.Null) or (column not in TEXTS and dtype.is_numeric())):
            what = "text" if column in TEXTS else "numbers"
            raise MpqError(f"{file} has {dtype} as {column}: expected {what}.")
    return count


def _of_this_model(
    frame: pl.DataFrame, file: str, facts: Mapping[str, str]
) -> tuple[pl.DataFrame, str]:
    """The rows that are of the run's checkpoint, and what says so."""
    own = {
        "fingerprint": facts.get("fingerprint", ""),
        "checkpoint": Path(facts.get("model", "")).name,
        "base": facts.get("base", ""),
    }
    by = "fingerprint" if "fingerprint" in frame.columns else "checkpoint"
    for column in (by, "base"):
        if column not in frame.columns:
            continue
        if frame[column].null_count():
            raise MpqError(
                f"{file} has a plan without a {column}: give each one, or leave the column out."
            )
        values, same = frame[column], frame[column] == own[column]
        if column == "fingerprint":  # of which the record has the beginning
            same = values.str.starts_with(own[column])
        there = ", ".join(map(str, values.unique(maintain_order=True).head(5)))
        if not own[column] or not same.any():
            raise MpqError(
                f"{file} is of another model: its {column} is {there}, this run's is {own[column] or 'not known'}; give plans "
                "that were measured on this run's checkpoint and base."
            )
        frame = frame.filter(same)
    if by in frame.columns:
        return frame, "" if by == "fingerprint" else "by its name alone"
    return frame, "by whoever gave the table: it names no checkpoint"


def _check_values(rows: pl.DataFrame, file: str, count: str, bits: float) -> None:
    """Raises MpqError for what can be no KL, and for what can be no size of this model.

    `bits` × a size are the bits of a weight.
    """
    for column, low, high, what in (
        ("kl", 0.0, math.inf, "nats per token, at least 0"),
        (count, BITS[0] / bits, BITS[1] / bits, f"{COUNTS[count].name.lower()} of this model"),
    ):
        values = rows[column].cast(pl.Float64, strict=False)
        right = values.is_finite() & values.is_between(low, high)
        wrong = rows[column].filter(~right.fill_null(False))
        if wrong.len():
            limits = f", between {low:,.0f} and {high:,.0f}" if column == count else ""
            raise MpqError(f"{file} has {wrong[0]} as {column}: expected {what}{limits}.")
    if rows["tool"].null_count() or (rows["tool"].str.strip_chars() == "").any():
        raise MpqError(f"{file} has a plan without a tool: name who made it.")


def _gains_with_kl(tables: Tables) -> tuple[str, pl.DataFrame]:
    """Memory's gains where the run has them: others know the same sensitivities, fewer choices."""
    gains = tables.get("gains")
    for objective in reversed(OBJECTIVES):
        of = gains.filter(objective=objective) if gains is not None else pl.DataFrame()
        if not of.is_empty() and cost_known(of) == "kl":
            return objective, of
    raise MpqError(
        "The run's gains have no KL, by which plans of other tools are compared: run its spec again, what is whole is re-used."
    )


def _measured(tables: Tables, objective: str, sizes: _Sizes) -> pl.DataFrame:
    """The run's plans for that objective, the program's and uniform ones, whose KL was measured and which lower weights alone."""
    results = plan_results(tables).filter(pl.col("measured_kl") > 0, objective=objective)
    results = results.filter(pl.col("strategy").str.contains("^(ip|uniform)_"))
    rows = []
    for at, ops in table_of(tables, "plans").group_by(KEYS, maintain_order=True):
        formats = dict(ops.select("op", "format").iter_rows())
        if any(not sizes.stores(op) and f != sizes.base for op, f in formats.items()):
            continue  # its KL is of attention's products as well, which no size here counts
        for kl in results.filter(**dict(zip(KEYS, at, strict=True)))["measured_kl"]:
            rows.append((str(at[1]), sizes.in_base - sizes.saved(formats), kl))
    schema = {"strategy": pl.String, "size": pl.Float64, "kl": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")
