"""A run's tables joined: predicted beside measured, a row a plan; and the names that tables, figures and pages share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl

from mpq.formats.format import FORMATS
from mpq.store.tables import SCHEMAS, validate
from mpq.timing.drift import carried

Tables = Mapping[str, pl.DataFrame]


STRATEGIES = ("ip_et", "ip_tt", "ip_m", "random", "prefix")


RATIO_RANGE = (0.5, 2.0)  # measured / predicted loss MSE outside of it is worth a warning


_KEYS = ["objective", "strategy", "tau"]


_NUMBERS = (
    "predicted_loss_mse",
    "measured_loss_mse",
    "predicted_ttft_s",
    "measured_ttft_s",
    "base_ttft_s",
    "perplexity",
    "base_perplexity",
    "share_lowered",
)


_FURTHER = (
    "measured_loss_mse_std",
    "measured_ttft_s_std",
    "perplexity_std",
    "budget",
    "predicted_gain",
    "solved_base_ttft_s",
)


class Objective(NamedTuple):
    """What an objective gains: its name, and how a gain in the tables' unit is shown (`scale` × gain, in `unit`)."""

    name: str
    saved: str
    unit: str
    scale: float


OBJECTIVES = {
    "et": Objective("time to first token", "time saved", "ms", 1e3),
    "tt": Objective("MAC time", "MAC time saved", "billion BF16 MACs", 1e-9),
    "m": Objective("weight memory", "memory saved", "MB", 1e-6),
}


def table_of(tables: Tables, name: str) -> pl.DataFrame:
    """The table called `name`, or an empty one where the run has none. Raises MpqError where columns are missing."""
    frame = tables.get(name)
    return (
        pl.DataFrame(schema=SCHEMAS[name])
        if frame is None or frame.is_empty()
        else validate(name, frame)
    )


def results_table(tables: Tables) -> pl.DataFrame:
    """Predicted beside measured, a row for each objective, strategy and τ: the mean over seeds and over random draws.

    Loss MSE in nats², times in seconds, `share_lowered` 0 to 1, `seeds` the number of measurements behind the loss MSE.
    Behind them: standard deviations over those measurements, the budget, the predicted gain and what the solver said.
    `base_ttft_s` was measured beside the plan, `solved_base_ttft_s` while configurations were timed, at whose speed `carried_ttft_s`
    and `carried_gain_s` are what was measured (drift.py). What was not predicted or not measured is null.
    """
    return _merged(tables, _KEYS).drop("plan_seed", strict=False)


def plan_results(tables: Tables) -> pl.DataFrame:
    """As `results_table`, with a row for each plan: the draws of the random strategy apart, told by `plan_seed`."""
    return _merged(tables, [*_KEYS, "plan_seed"])


def _merged(tables: Tables, keys: list[str]) -> pl.DataFrame:
    solutions = table_of(tables, "solutions").rename(
        {"seed": "plan_seed", "base_ttft_s": "solved_base_ttft_s"}
    )
    numbers = (
        "predicted_loss_mse",
        "predicted_ttft_s",
        "solved_base_ttft_s",
        "share_lowered",
        "budget",
        "predicted_gain",
    )
    words = (
        pl.col(c).drop_nulls().unique(maintain_order=True).str.join("; ")
        for c in ("status", "solver", "note")
    )
    merged = solutions.group_by(keys).agg(*(pl.col(c).mean() for c in numbers), *words)
    loss = table_of(tables, "evaluation").filter(pl.col("task") == "loss")
    for metric, name, base in (
        ("loss_mse", "measured_loss_mse", "mean_square_loss"),
        ("ttft_s", "measured_ttft_s", "base_ttft_s"),
        ("perplexity", "perplexity", "base_perplexity"),
    ):
        value = pl.col("value")
        seeds = [pl.len().cast(pl.Int64).alias("seeds")] if metric == "loss_mse" else []
        measured = (
            loss.filter(pl.col("metric") == metric)
            .group_by(keys)
            .agg(
                value.mean().alias(name),
                value.std().alias(f"{name}_std"),
                pl.col("base_value").mean().alias(base),
                *seeds,
            )
        )
        merged = merged.join(measured, on=keys, how="full", coalesce=True)
    place = {name: i for i, name in enumerate((*OBJECTIVES, *STRATEGIES))}
    whole = (
        merged.with_columns(
            pl.coalesce("base_ttft_s", "solved_base_ttft_s").alias("base_ttft_s"),
            pl.col("seeds").fill_null(0),
        )
        .sort(
            pl.col("objective").replace_strict(place, default=99),
            pl.col("strategy").replace_strict(place, default=99),
            *keys,
        )
        .select(*keys, *_NUMBERS, "seeds", *_FURTHER, "status", "solver", "note")
    )
    return carried(whole)


def gain_of(row: Mapping[str, Any]) -> tuple[float | None, bool]:
    """What a row of results gains, in the objective's unit of the tables, and whether that was measured."""
    if row["objective"] == "et" and row["carried_gain_s"] is not None:
        return row["carried_gain_s"], True
    return row["predicted_gain"], False


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds in four digits, without the unit."""
    return "–" if seconds is None else f"{seconds * 1e3:.4g}"


def base_of(tables: Tables, facts: Mapping[str, str]) -> str:
    """The base format: what the facts say, or else the widest in the plans."""
    found = table_of(tables, "plans")["format"].unique().to_list()
    return facts.get("base") or max(
        found, key=lambda f: FORMATS[f].bits if f in FORMATS else 0, default=""
    )
