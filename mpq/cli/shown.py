"""Tables as people are shown them: what a terminal of 80 characters holds. Files and --json have every column."""

from __future__ import annotations

import polars as pl

from mpq.timing.answer import base_answer_of


def results(table: pl.DataFrame) -> pl.DataFrame:
    """The results table in columns that fit a terminal: loss MSE (nats²), or KL (nats per token) where that is bounded, and TTFT
    (ms), predicted and measured, ops lowered in %."""
    bounded = table["kl_bound"].is_not_null().any()
    columns = ("kl_bound", "predicted_kl", "measured_kl")
    if not bounded:
        columns = ("tau", "predicted_loss_mse", "measured_loss_mse")
    names = ("KL ≤", "KL pred.", "KL meas.") if bounded else ("τ", "MSE pred.", "MSE meas.")
    cost = [
        pl.col(column).round_sig_figs(3).alias(name)
        for column, name in zip(columns, names, strict=True)
    ]

    def milliseconds(column: str) -> pl.Expr:
        return (pl.col(column) * 1e3).round(1)

    return table.select(
        pl.col("objective").alias("for"),
        # a name too long for its column breaks between words
        pl.col("strategy").str.replace("uniform_", "uniform ").str.replace("_but_", " but "),
        *cost,
        milliseconds("predicted_ttft_s").alias("ms pred."),
        milliseconds("measured_ttft_s").alias("ms meas."),
        milliseconds("base_ttft_s").alias("base"),
        (pl.col("share_lowered") * 100).round(0).alias("low %"),
    )


def groups(table: pl.DataFrame) -> pl.DataFrame:
    """The groups table in columns that fit a terminal: an op's group, name, features in and out, billions of MACs, millions of weights."""
    features = pl.format("{} → {}", "in_features", "out_features")
    experts = pl.col("parameters") // (pl.col("in_features") * pl.col("out_features"))
    return table.sort("order").select(
        "group",
        "op",
        pl.when(pl.col("kind") == "bgemm")
        .then(pl.format("{} heads", "heads"))
        .when(pl.col("kind") == "experts")
        .then(pl.format("{} × {}", experts, features))
        .otherwise(features)
        .alias("shape"),
        (pl.col("macs") / 1e9).round_sig_figs(4).alias("G MACs"),
        (pl.col("parameters") / 1e6).round(2).alias("M weights"),
    )


def sensitivity(table: pl.DataFrame, base: str) -> pl.DataFrame:
    """The sensitivity table in columns that fit a terminal: the loss MSE (nats², with the rounding that
    happens) of lowering each op alone, a column for each format, the most sensitive op first."""
    model = "actual" if "actual" in table["noise_model"].to_list() else "ulp"  # of earlier tables
    lowered = table.filter(pl.col("noise_model") == model, pl.col("format") != base)
    by_op = lowered.pivot(
        "format", index="op", values="loss_mse", aggregate_function="sum", maintain_order=True
    )
    formats = [c for c in by_op.columns if c != "op"]
    return by_op.sort(pl.max_horizontal(formats), descending=True)


def timing(table: pl.DataFrame, base: str) -> pl.DataFrame:
    """The timing table in columns that fit a terminal, each signature's largest gain first: ops, base as a dot; what all its groups gain
    together (ms, ± half the 95 % interval, % of base's time); whether that is surely not zero."""
    base_time = base_answer_of(table)
    half = (pl.col("gain_ci_high_s") - pl.col("gain_ci_low_s")) / 2 * pl.col("instances")
    gain = pl.col("gain_s") * pl.col("instances")
    tokens = [
        (pl.col(column) * 1e3).round(2).alias(name)
        for column, name in (("tpot_s", "ms a token"), ("base_tpot_s", "base"))
        if column in table.columns
    ]
    return table.sort("group", "signature", -gain).select(
        pl.col("signature")
        .str.replace(r"-[0-9a-f]+$", "")
        .str.replace_all("+", " ", literal=True)
        .alias("ops"),
        pl.col("instances").alias("×"),
        pl.col("configuration").list.eval(pl.element().replace(base, "·")).alias("formats"),
        (gain * 1e3).round(2).alias("gain ms"),
        (half * 1e3).round(2).alias("± ms"),
        (gain / base_time * 100).round(1).alias("% of time" if tokens else "% of TTFT"),
        *tokens,
        pl.when(pl.col("significant")).then(pl.lit("yes")).otherwise(pl.lit("–")).alias("sure"),
    )
