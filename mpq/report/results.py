"""A run's tables joined: predicted beside measured, a row a plan; and the names that tables,
figures and pages share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl

from mpq.formats.scheme import SCHEMES
from mpq.program.anchors import Scale
from mpq.program.memory import with_bytes
from mpq.store.tables import SCHEMAS, validate
from mpq.timing.drift import carried

Tables = Mapping[str, pl.DataFrame]

# uniform_<format> stand behind these, by name
STRATEGIES = ("ip_et", "ip_tt", "ip_m", "random", "prefix")
RATIO_RANGE = (0.5, 2.0)  # measured / predicted loss MSE outside of it is worth a warning

KEYS = ["objective", "strategy", "tau"]
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
    "predicted_gain_error",
    "solved_base_ttft_s",
    "measured_gain_s",
    "measured_gain_low_s",
    "measured_gain_high_s",
    "weight_bytes",
    "base_weight_bytes",
    "cache_bytes",
    "base_cache_bytes",
    "predicted_kl",
    "predicted_kl_error",
    "kl_bound",
    "kl_scale",
    "checked_kl",
    "predicted_loss_mse_error",
    "predicted_signed_mse",
    "risk",
    "measured_kl",
    "measured_kl_std",
    "output",
    "predicted_tpot_s",
    "measured_tpot_s",
    "base_tpot_s",
    "solved_base_tpot_s",
)
# of the evaluation table: metric, its column here, the column of its base value
_METRICS = (
    ("loss_mse", "measured_loss_mse", "mean_square_loss"),
    ("kl", "measured_kl", None),
    ("ttft_s", "measured_ttft_s", "base_ttft_s"),
    ("tpot_s", "measured_tpot_s", "base_tpot_s"),
    ("perplexity", "perplexity", "base_perplexity"),
    ("gain_s", "measured_gain_s", None),
    ("gain_ci_low_s", "measured_gain_low_s", None),
    ("gain_ci_high_s", "measured_gain_high_s", None),
)


class Objective(NamedTuple):
    """What an objective gains, and how a gain of the tables is shown: `scale` × gain, in `unit`."""

    name: str
    saved: str
    unit: str
    scale: float


OBJECTIVES = {
    "et": Objective("time to first token", "time saved", "ms", 1e3),
    "tt": Objective("MAC time", "MAC time saved", "billion BF16 MACs", 1e-9),
    "m": Objective("memory", "memory saved", "MB", 1e-6),
}


def table_of(tables: Tables, name: str) -> pl.DataFrame:
    """The table called `name`, or an empty one where the run has none.

    Raises MpqError where columns are missing.
    """
    frame = tables.get(name)
    if frame is None or frame.is_empty():
        return pl.DataFrame(schema=SCHEMAS[name])
    return validate(name, frame)


def results_table(tables: Tables) -> pl.DataFrame:
    """Predicted beside measured, a row for each objective, strategy and τ.

    Numbers are means over seeds and over random draws. Loss MSE in nats², times in seconds,
    `share_lowered` 0 to 1, `seeds` the number of measurements behind the loss MSE. Further columns:

    - standard deviations over those measurements; the budget; what the solver said;
    - `predicted_gain`, in the objective's unit, and half its 95 % interval `predicted_gain_error`;
    - `predicted_kl` with half its 95 % interval, `measured_kl`, `checked_kl` (measured before the
      plan was delivered) and their bound `kl_bound`, all in nats per predicted token; `kl_scale`;
    - `predicted_loss_mse_error`, half its 95 % interval; `predicted_signed_mse`, the loss MSE with
      rounding's signs and the drift (nats²); `risk`, the chance that a bound is broken;
    - `measured_gain_s`, the median over pairs of base and plan, with its 95 % interval;
    - `weight_bytes` of the linears' weights, and `base_weight_bytes`; where it was decided, `cache_bytes` of the keys and
      values of the workload's requests, and `base_cache_bytes`;
    - `base_ttft_s` was measured beside the plan, `solved_base_ttft_s` while configurations were
      timed. `carried_ttft_s`, `carried_gain_s`, `carried_gain_low_s` and `carried_gain_high_s` are
      what was measured, scaled to the machine's speed at that time (drift.py);
    - of answers of `output` tokens the times per token after the first, `…_tpot_s`; and of all the
      time to gain, TTFT or that of the whole answer: `predicted_time_s`, `measured_time_s`,
      `base_time_s`, `solved_base_time_s`, `carried_time_s` (and `carried_tpot_s`).

    What was not predicted or not measured is null.
    """
    return _merged(tables, KEYS).drop("plan_seed", strict=False)


def plan_results(tables: Tables) -> pl.DataFrame:
    """As `results_table`, a row for each plan: random's draws apart, told by `plan_seed`."""
    return _merged(tables, [*KEYS, "plan_seed"])


def _merged(tables: Tables, keys: list[str]) -> pl.DataFrame:
    solutions = table_of(tables, "solutions").rename(
        {"seed": "plan_seed", "base_ttft_s": "solved_base_ttft_s"}
    )
    solutions = solutions.rename({"base_tpot_s": "solved_base_tpot_s"}, strict=False)
    # a run of an earlier version, or of answers of one token
    absent = (
        *("predicted_gain_error", "predicted_tpot_s", "solved_base_tpot_s", "output"),
        *("cache_bytes", "base_cache_bytes"),  # and of runs in which the cache was not decided
    )
    solutions = solutions.with_columns(
        pl.lit(None, pl.Float64).alias(c) for c in absent if c not in solutions.columns
    )
    # the bytes of a plan are those of all its ops, decided or not (_weights)
    asked = [c for c in (*_NUMBERS, *_FURTHER) if c != "weight_bytes"]
    numbers = [c for c in asked if c in solutions.columns]
    words = (
        pl.col(c).drop_nulls().unique(maintain_order=True).str.join("; ")
        for c in ("status", "solver", "note")
    )
    merged = solutions.group_by(keys).agg(*(pl.col(c).mean() for c in numbers), *words)
    for measured in _measured(tables, keys):
        merged = merged.join(measured, on=keys, how="full", coalesce=True)
    sizes = pl.col("weight_bytes", "base_weight_bytes").mean()
    weights = _weights(tables).group_by(keys).agg(sizes)
    place = {name: i for i, name in enumerate((*OBJECTIVES, *STRATEGIES))}
    whole = (
        merged.join(weights, on=keys, how="left")
        .with_columns(
            pl.coalesce("base_ttft_s", "solved_base_ttft_s").alias("base_ttft_s"),
            pl.coalesce("base_tpot_s", "solved_base_tpot_s").alias("base_tpot_s"),
            pl.col("output").cast(pl.Int64),
            pl.col("seeds").fill_null(0),
        )
        .sort(
            pl.col("objective").replace_strict(place, default=99),
            pl.col("strategy").replace_strict(place, default=99),
            *keys,
        )
        .select(*keys, *_NUMBERS, "seeds", *_FURTHER, "status", "solver", "note")
    )
    return _at_one_speed(whole)


def _measured(tables: Tables, keys: list[str]) -> list[pl.DataFrame]:
    """A frame for each metric of the held-out text: its mean, its standard deviation, its base."""
    loss = table_of(tables, "evaluation").filter(task="loss")
    found = []
    for metric, name, base in _METRICS:
        value = pl.col("value")
        columns = [value.mean().alias(name), value.std().alias(f"{name}_std")]
        if base:
            columns.append(pl.col("base_value").mean().alias(base))
        if metric == "loss_mse":
            columns.append(pl.len().cast(pl.Int64).alias("seeds"))
        found.append(loss.filter(metric=metric).group_by(keys).agg(columns))
    return found


def _weights(tables: Tables) -> pl.DataFrame:
    """Bytes of the linears' and experts' weights under each plan, and in base (program.memory).

    Ops that a plan does not decide are in base.
    """
    base, plans = base_of(tables, {}), table_of(tables, "plans").rename({"seed": "plan_seed"})
    ops = table_of(tables, "groups")
    in_base = with_bytes(ops.with_columns(format=pl.lit(base)), base).select(
        "op", base_bytes="bytes"
    )
    taken = with_bytes(plans.select("op", "format").unique().join(ops, on="op"), base)
    more = taken.join(in_base, on="op").select(
        "op", "format", more=pl.col("bytes") - pl.col("base_bytes")
    )
    whole = math.fsum(in_base["base_bytes"])
    return (
        plans.join(more, on=["op", "format"])
        .group_by(*KEYS, "plan_seed")
        .agg(weight_bytes=whole + pl.col("more").sum())
        .with_columns(base_weight_bytes=pl.lit(whole))
    )


def _at_one_speed(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with times carried to the speed of timing; a gain that was measured pair by pair
    is taken as such, else it is the difference of the two times."""
    speed = (pl.col("solved_base_ttft_s") / pl.col("base_ttft_s")).fill_null(1.0)
    times = {
        f"{of}_time_s": pl.col(f"{of}_ttft_s")
        + pl.when(pl.col("output") > 1)
        .then((pl.col("output") - 1) * pl.col(f"{of}_tpot_s"))
        .otherwise(0.0)
        for of in ("predicted", "measured", "base", "solved_base")
    }
    rows = rows.with_columns(**times)
    return carried(rows).with_columns(
        carried_time_s=pl.col("measured_time_s") * speed,
        carried_tpot_s=pl.col("measured_tpot_s") * speed,
        carried_gain_s=pl.coalesce(pl.col("measured_gain_s") * speed, "carried_gain_s"),
        carried_gain_low_s=pl.col("measured_gain_low_s") * speed,
        carried_gain_high_s=pl.col("measured_gain_high_s") * speed,
    )


class Gain(NamedTuple):
    """What a plan gains, in the objective's unit of the tables: measured, or predicted.

    `low` and `high` are its 95 % interval. A gain in MACs or bytes is known exactly, so both are
    the gain itself; where time was measured without an interval, or predicted, they are None.
    """

    value: float
    low: float | None
    high: float | None
    measured: bool

    def above(self, other: Gain) -> bool:
        """Whether it is surely larger: the intervals don't overlap."""
        if self.low is None or other.high is None:
            return False
        return self.low > other.high + 1e-9 * abs(other.high)


def gain_of(row: Mapping[str, Any]) -> Gain | None:
    """The gain of a row of results; None where there is none."""
    if row["objective"] == "et" and row["carried_gain_s"] is not None:
        low, high = row["carried_gain_low_s"], row["carried_gain_high_s"]
        return Gain(row["carried_gain_s"], low, high, True)
    gain = row["predicted_gain"]
    if gain is None:
        return None
    if row["objective"] != "et":
        return Gain(gain, gain, gain, False)
    error = row["predicted_gain_error"]
    low, high = (None, None) if error is None else (gain - error, gain + error)
    return Gain(gain, low, high, False)


def name_of_time(rows: pl.DataFrame) -> str:
    """What time plans gain: TTFT, or that of answers of several tokens."""
    tokens = max((n for n in rows["output"] if n), default=1)
    return "TTFT" if tokens == 1 else f"Time of {tokens} tokens"


def bound_of(row: Mapping[str, Any]) -> str:
    """A plan's bound in words: `τ = 0.002`, or where KL alone is bounded `KL ≤ 0.005`."""
    if row["budget"] is None and row["kl_bound"] is not None:
        return f"KL ≤ {row['kl_bound']:.3g}"
    return f"τ = {row['tau']:g}"


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds in four digits, without the unit."""
    return "–" if seconds is None else f"{seconds * 1e3:.4g}"


def plus_minus(value: float, half: float | None) -> str:
    """`8.1 ± 0.9`: as many decimals as the error deserves, two where it begins with a 1."""
    if half is None or not math.isfinite(half) or half <= 0:
        return f"{value:.4g}".replace("-", "−")
    half = float(f"{half:.3g}")  # 0.19999 is 0.2
    exponent = math.floor(math.log10(half))
    decimals = max(0, -exponent + (half < 2 * 10**exponent))
    return f"{value:.{decimals}f} ± {half:.{decimals}f}".replace("-", "−")


def sentence(words: str) -> str:
    """The words with a capital first letter."""
    return words[:1].upper() + words[1:]


def scale_of(tables: Tables, objective: str) -> Scale:
    """What all measured plans said of the predicted KL.

    It is the least of the plans' scales: one that was over its bound was given a larger one.
    """
    solutions = tables.get("solutions", pl.DataFrame())
    if "kl_scale" not in solutions.columns:
        return Scale()
    own = solutions.filter(objective=objective, strategy=f"ip_{objective}")["kl_scale"]
    least = own.drop_nulls().min()
    return Scale() if least is None else Scale(float(least))  # type: ignore[arg-type]


def base_of(tables: Tables, facts: Mapping[str, str]) -> str:
    """The base format: what the facts say, or else the widest in the plans."""
    if base := facts.get("base"):
        return base
    found = sorted(table_of(tables, "plans")["format"].unique())
    return max(found, key=lambda f: SCHEMES[f].bits if f in SCHEMES else 0, default="")
