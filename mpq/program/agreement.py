"""Whether tables that somebody hands in, each whole by itself, belong together."""

from __future__ import annotations

import math

import polars as pl

from mpq.errors import MpqError
from mpq.formats.scheme import get_scheme
from mpq.program.memory import STORED
from mpq.store.tables import validate
from mpq.timing.design import members

_MOST = 1e150  # whose square and sums floats still hold


def given(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """A table of this name that somebody hands in, its columns of their types (tables.validate).

    Raises MpqError for values that are NaN, or so large that their sums are no numbers; infinite ones say that a format overflows.
    """
    frame = validate(name, frame)
    for column in frame.select(pl.col(pl.Float64)):
        finite = column.is_null() | column.is_infinite() | (column.abs() <= _MOST)
        if column.is_nan().any() or not finite.all():
            raise MpqError(
                f"The {name} table has a {column.name} that no measurement gives, NaN or beyond {_MOST:g}: check where it comes from."
            )
    if name == "effects" and not frame["sample"].is_between(0, frame.height - 1).all():
        raise MpqError(
            "The effects table counts more samples than it has rows: expected the table that `mpq sensitivity --effects` writes."
        )
    return frame


def check_agreement(groups: pl.DataFrame, gains: pl.DataFrame) -> None:
    """Raise MpqError unless a gains table decides ops of the groups table, a format for each, and these have sizes."""
    known, of = set(groups["op"]), members(groups, gains)
    for group, formats in gains.select("group", "configuration").iter_rows():
        ops = of.get(group) or ()
        if len(ops) != len(formats) or not known.issuperset(ops):
            raise MpqError(
                f"Group {group} of the gains table puts {len(formats)} ops in formats, of which the groups table knows "
                f"{len(known.intersection(ops))}: give the groups table that the gains are of."
            )
    for name in {f for formats in gains["configuration"] for f in formats}:
        get_scheme(name)
    stored = groups.filter(pl.col("kind").is_in(STORED))
    if not stored.is_empty() and stored.select("in_features", "out_features").min().row(0) < (1, 1):
        raise MpqError(
            "The groups table has linears without features: expected the table that `mpq partition` writes."
        )


def mean_square_of(loss: pl.DataFrame) -> float:
    """E[g²] (nats²) of a `loss` table. Raises MpqError unless it has one row, and a number above zero there."""
    values = loss["mean_square_loss"].to_list()
    if len(values) != 1 or not (math.isfinite(values[0]) and values[0] > 0):
        raise MpqError(
            f"The loss table has {len(values)} rows, mean_square_loss = {', '.join(f'{v:g}' for v in values[:3]) or 'none'}: "
            "expected one row with a number above zero, as `mpq sensitivity --json` tells it."
        )
    return float(values[0])
