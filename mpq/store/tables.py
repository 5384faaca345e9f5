"""The tables that stages hand each other: polars schemas, units in the column names, and their validation."""

from __future__ import annotations

import polars as pl

from mpq.errors import MpqError

CONFIGURATION = pl.List(pl.String)  # formats in the group's op order

SCHEMAS: dict[str, dict[str, pl.DataType | type[pl.DataType]]] = {
    # one row an op; order is the op's place in the model, group its sequential sub-graph
    "groups": {
        "group": pl.Int64,
        "order": pl.Int64,
        "op": pl.String,
        "kind": pl.String,
        "signature": pl.String,
        "in_features": pl.Int64,
        "out_features": pl.Int64,
        "macs": pl.Int64,
        "parameters": pl.Int64,
        "heads": pl.Int64,
        "kv_heads": pl.Int64,
    },
    # one row an op, operand, format and noise model; loss_mse is d of method.md (22, 24), sensitivity is s (21, 23),
    # kl is b ("KL and the rounding that happens", nats per token), of noise model actual alone; _stderr are standard errors,
    # _shared is what an activation's errors add by having signs in common, counted where it is sure (loss/shared.py)
    "sensitivity": {
        "op": pl.String,
        "operand": pl.String,
        "format": pl.String,
        "noise_model": pl.String,
        "n_samples": pl.Int64,
        "loss_mse": pl.Float64,
        "loss_mse_stderr": pl.Float64,
        "sensitivity": pl.Float64,
        "kl": pl.Float64,
        "kl_stderr": pl.Float64,
        "loss_mse_shared": pl.Float64,
        "loss_mse_shared_stderr": pl.Float64,
        "kl_shared": pl.Float64,
        "kl_shared_stderr": pl.Float64,
        "kl_summed": pl.Float64,
    },
    # one row a calibration sample, op and format: what rounding the op's weight does to the sample's loss, first order, nats
    "effects": {
        "sample": pl.Int64,
        "op": pl.String,
        "format": pl.String,
        "effect": pl.Float64,
    },
    # one row a block of text or document of a task that was drawn; part is calibration, evaluation (of the loss) or tasks (scored)
    "drawn": {
        "part": pl.String,
        "source": pl.String,
        "unit": pl.String,
        "index": pl.Int64,
        "of": pl.Int64,
    },
    "loss": {"n_samples": pl.Int64, "mean_square_loss": pl.Float64, "mean_loss": pl.Float64},
    # gain_s is the time gained by ONE instance of the group in this configuration; answers of several tokens: timing/answer.py
    "timing": {
        "signature": pl.String,
        "group": pl.Int64,
        "configuration": CONFIGURATION,
        "instances": pl.Int64,
        "repeats": pl.Int64,
        "ttft_s": pl.Float64,
        "base_ttft_s": pl.Float64,
        "gain_s": pl.Float64,
        "gain_ci_low_s": pl.Float64,
        "gain_ci_high_s": pl.Float64,
        "device": pl.String,
        "method": pl.String,
        "batch": pl.Int64,
        "length": pl.Int64,
        "load_average": pl.Float64,
        "steal_share": pl.Float64,
        "disturbed": pl.Int64,
        "order_measured": pl.Int64,
        "significant": pl.Boolean,
        "mode": pl.String,
        "predicted": pl.Boolean,
        "clock": pl.String,
        "threads": pl.Int64,
    },
    # group: for et a group of the groups table; for tt and m, which add up over ops, an op's `order`
    "gains": {
        "objective": pl.String,
        "group": pl.Int64,
        "configuration": CONFIGURATION,
        "gain": pl.Float64,
        "loss_mse": pl.Float64,
        "loss_mse_stderr": pl.Float64,
        "kl": pl.Float64,
        "kl_stderr": pl.Float64,
    },
    "plans": {
        "strategy": pl.String,
        "objective": pl.String,
        "tau": pl.Float64,
        "seed": pl.Int64,
        "op": pl.String,
        "format": pl.String,
    },
    "solutions": {
        "strategy": pl.String,
        "objective": pl.String,
        "tau": pl.Float64,
        "seed": pl.Int64,
        "predicted_loss_mse": pl.Float64,
        "budget": pl.Float64,
        "predicted_gain": pl.Float64,
        "bound": pl.Float64,
        "status": pl.String,
        "solver": pl.String,
        "seconds": pl.Float64,
        "note": pl.String,
        "share_lowered": pl.Float64,
        "predicted_ttft_s": pl.Float64,
        "base_ttft_s": pl.Float64,
        "predicted_kl": pl.Float64,
        "predicted_kl_error": pl.Float64,
        "kl_bound": pl.Float64,
        "kl_scale": pl.Float64,
        "checked_kl": pl.Float64,
        "predicted_loss_mse_error": pl.Float64,
        "predicted_signed_mse": pl.Float64,
        "risk": pl.Float64,
    },
    # one row a plan of the program and a constraint: what it gains and costs as it is, and without that one
    "prices": {
        "strategy": pl.String,
        "objective": pl.String,
        "tau": pl.Float64,
        "constraint": pl.String,
        "gain": pl.Float64,
        "gain_without": pl.Float64,
        "loss_mse": pl.Float64,
        "loss_mse_without": pl.Float64,
        "kl": pl.Float64,
        "kl_without": pl.Float64,
    },
    # metric: loss_mse, ttft_s, perplexity, ...; task is `loss` for the held-out text itself
    "evaluation": {
        "strategy": pl.String,
        "objective": pl.String,
        "tau": pl.Float64,
        "plan_seed": pl.Int64,
        "seed": pl.Int64,
        "task": pl.String,
        "metric": pl.String,
        "value": pl.Float64,
        "base_value": pl.Float64,
    },
}

# columns that tables of earlier versions, and those of other makers, may lack
LATER = {
    "sensitivity": (
        "loss_mse_stderr",
        "kl",
        "kl_stderr",
        "loss_mse_shared",
        "loss_mse_shared_stderr",
        "kl_shared",
        "kl_shared_stderr",
        "kl_summed",
    ),
    "gains": ("loss_mse_stderr", "kl", "kl_stderr"),
    "solutions": (
        "predicted_kl",
        "predicted_kl_error",
        "kl_bound",
        "kl_scale",
        "checked_kl",
        "predicted_loss_mse_error",
        "predicted_signed_mse",
        "risk",
    ),
    "prices": ("kl", "kl_without"),
}

# of columns that a table may have more, their types
FURTHER: dict[str, dict[str, pl.DataType | type[pl.DataType]]] = {
    "groups": {"feeds": pl.List(pl.String), "tied": pl.Boolean, "window": pl.Int64},
    "timing": {
        "pooled_gain_s": pl.Float64,
        "pooled_error_s": pl.Float64,
        "output": pl.Int64,
        "tpot_s": pl.Float64,
        "base_tpot_s": pl.Float64,
        "ttft_gain_s": pl.Float64,
        "tpot_gain_s": pl.Float64,
    },
    "gains": {"ops": pl.List(pl.String)},
    "solutions": {
        "predicted_gain_error": pl.Float64,
        "effective_bits": pl.Float64,
        "weight_bytes": pl.Float64,
        "output": pl.Float64,
        "base_tpot_s": pl.Float64,
        "predicted_tpot_s": pl.Float64,
        "cache_bytes": pl.Float64,
        "base_cache_bytes": pl.Float64,
    },
}


def table(name: str, rows: list[dict[str, object]]) -> pl.DataFrame:
    """Rows as the table called `name`, in its column order."""
    return validate(name, pl.DataFrame(rows, schema=SCHEMAS[name], strict=False))


def upgraded(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """A table as earlier versions wrote it, with the columns that came later: `order_measured` was called `measured`, a row
    without repeats was `predicted`, every clock was wall time's (a GPU's graphs: events), and nothing said of KL."""
    later = {c: pl.Float64 for c in LATER.get(name, ()) if c not in frame.columns}
    frame = frame.with_columns(pl.lit(None, dtype).alias(c) for c, dtype in later.items())
    if name != "timing" or not {"repeats", "device"} <= set(frame.columns):
        return frame
    if "measured" in frame.columns and "order_measured" not in frame.columns:
        frame = frame.rename({"measured": "order_measured"})
    absent = {"order_measured": pl.Int64, "predicted": pl.Boolean, "clock": pl.String}
    frame = frame.with_columns(
        pl.lit(None, dtype).alias(c)
        for c, dtype in {**absent, "mode": pl.String, "threads": pl.Int64}.items()
        if c not in frame.columns
    )
    graph = pl.col("mode").fill_null("").str.contains("graph")
    return frame.with_columns(
        pl.col("predicted").fill_null(pl.col("repeats") == 0),
        pl.col("clock").fill_null(pl.when(graph).then(pl.lit("events")).otherwise(pl.lit("wall"))),
    )


def validate(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with the columns of table `name`, cast to their types; further columns are kept behind them.

    Raises MpqError that names the missing columns or the one that cannot be cast.
    """
    schema = SCHEMAS[name]
    try:
        frame = upgraded(name, frame)
    except pl.exceptions.PolarsError as error:
        raise MpqError(
            f"The {name} table has a column of the wrong type: {str(error).splitlines()[0]}."
        ) from None
    missing = [column for column in schema if column not in frame.columns]
    if missing:
        raise MpqError(
            f"The {name} table lacks {', '.join(missing)}: expected the columns {', '.join(schema)}."
        )
    more: dict[str, pl.DataType | type[pl.DataType]]
    more = {c: t for c, t in FURTHER.get(name, {}).items() if c in frame.columns}
    for column, kind in {**schema, **more}.items():
        try:
            cast = frame[column].cast(kind)
        except pl.exceptions.PolarsError as error:
            raise _mistyped(name, column, str(error).splitlines()[0]) from None
        if cast.dtype != kind:  # of a struct each field is cast
            raise _mistyped(name, column, f"it holds {frame[column].dtype}")
        frame = frame.with_columns(cast)
    return frame.select(*schema, *(c for c in frame.columns if c not in schema))


def _mistyped(name: str, column: str, why: str) -> MpqError:
    return MpqError(f"The {name} table has the column {column} of the wrong type: {why}.")
