import polars as pl


def write_report(tables, title, facts):
    return "<html></html>"


def results_table(tables):
    e = (
        tables["evaluation"]
        .filter(pl.col("metric") == "loss_mse")
        .group_by("strategy", "objective", "tau")
        .agg(pl.col("value").mean().alias("measured_loss_mse"))
    )
    return tables["solutions"].join(e, on=["strategy", "objective", "tau"])
