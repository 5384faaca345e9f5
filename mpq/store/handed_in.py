"""Tables that people hand in: beyond the columns and types of tables.py, rows that belong to a measurement."""

from __future__ import annotations

import polars as pl

from mpq.errors import MpqError
from mpq.store.tables import validate

_MOST = 1e150  # whose square, and sums of it, floats still hold
# what no row lacks, and in a table that people hand in which of these columns tell its rows apart
_NEEDED: dict[str, tuple[str, ...]] = {
    "groups": (
        "group",
        "order",
        "op",
        "kind",
        "signature",
        "in_features",
        "out_features",
        "parameters",
    ),
    "gains": ("objective", "group", "configuration", "gain", "loss_mse"),
    "loss": ("mean_square_loss",),
    "sensitivity": ("op", "operand", "format", "noise_model"),
    "effects": ("sample", "op", "format", "effect"),
    "timing": ("signature", "group", "configuration", "instances", "repeats", "gain_s", "device"),
    "plans": ("strategy", "objective", "tau", "seed", "op", "format"),
    "solutions": ("strategy", "objective", "tau", "seed"),
    "prices": ("strategy", "objective", "tau", "constraint", "gain", "gain_without"),
    "evaluation": ("strategy", "objective", "tau", "plan_seed", "seed", "task", "metric"),
}
_ONCE = {
    "groups": ("op",),
    "sensitivity": ("op", "operand", "format", "noise_model"),
}


def complete(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """`validate`, and of what tells rows apart nothing is missing. Raises MpqError that names the column."""
    frame = validate(name, frame)
    for column in _NEEDED.get(name, ()):
        if frame[column].null_count():
            raise MpqError(
                f"The {name} table has a row without a value in {column}: expected one in each."
            )
    return frame


def handed_in(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """`validate`, for a table that people hand in: nothing is missing in its rows, none stands twice, and counts are counts.

    Raises MpqError that names the column.
    """
    frame, needed = validate(name, frame), _NEEDED[name]
    if not frame.height:
        raise MpqError(f"The {name} table has no rows.")
    numbers = [c for c in needed if frame[c].dtype.is_float()]
    for values in frame.select(pl.col(pl.Float64)):  # infinite ones say that a format overflows
        known = values.is_null() | values.is_infinite() | (values.abs() <= _MOST)
        if values.is_nan().any() or not known.all():
            raise MpqError(
                f"The {name} table has a {values.name} that no measurement gives, NaN or beyond {_MOST:g}."
            )
    for column in needed:
        values = frame[column]
        if values.null_count() or (column in numbers and not values.is_finite().all()):
            raise MpqError(
                f"The {name} table has a row without a value in {column}: expected one in each."
            )
        if values.dtype.is_integer() and (below := values.filter(values < 0)).len():
            raise MpqError(f"The {name} table has {below[0]} in {column}: expected 0 or more.")
    if name in _ONCE and frame.select(_ONCE[name]).is_duplicated().any():
        raise MpqError(
            f"The {name} table has a row twice: expected each {', '.join(_ONCE[name])} once."
        )
    if name == "groups" and frame["order"].is_duplicated().any():  # by which gains name ops
        raise MpqError("The groups table has two ops of one order: expected each op's own place.")
    if name == "gains" and frame.schema.get("ops") == pl.List(pl.String):
        if frame["ops"].explode().null_count():
            raise MpqError(
                "The gains table has a row without a value in ops: expected one in each."
            )
        if frame.select("group", "ops").unique().height > frame["group"].n_unique():
            raise MpqError(
                "The gains table has other ops in other rows of a group: expected the same."
            )
    of_weights = pl.col("kind").is_in(["linear", "experts"])
    no_size = pl.col("in_features") * pl.col("out_features") == 0
    if name == "groups" and frame.filter(of_weights, no_size).height:
        raise MpqError(
            "The groups table has a linear without in_features or out_features: expected 1 or more."
        )
    if name == "loss" and (frame.height > 1 or frame["mean_square_loss"][0] <= 0):
        raise MpqError(
            "The loss table must be one row, its mean_square_loss above zero: it is E[g²] (nats²)."
        )
    return frame
