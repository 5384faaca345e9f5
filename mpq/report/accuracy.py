"""What plans cost on tasks: differences to the base model, a row a seed, τ and strategy.

Accuracy differences are in percentage points (100 × the difference of fractions), perplexity
differences in percent of the base model's perplexity. Both are paired: each measurement minus the
base's own beside it.
"""

from __future__ import annotations

import polars as pl

from mpq.report.results import KEYS, OBJECTIVES, STRATEGIES, Tables, table_of

HELD_OUT = "loss"  # the task that is the held-out text itself
AVERAGE = "average"  # over tasks, beside the tasks' own names
TASKS = {
    "lambada_openai": "LAMBADA",
    "hellaswag": "HellaSwag",
    "winogrande": "Winogrande",
    "piqa": "PIQA",
    AVERAGE: "Average of the tasks",
}
METRICS = {"acc": "accuracy difference (points)", "perplexity": "perplexity difference (%)"}
DRAW = ["plan_seed", "seed"]


def name_of_task(task: str) -> str:
    """The task's name for people; other harness tasks keep theirs."""
    return TASKS.get(task, task)


def differences(tables: Tables) -> pl.DataFrame:
    """Each measurement's difference to base: KEYS, plan_seed, seed, task, metric, difference.

    Metrics are `acc` (points) and `perplexity` (percent); the held-out text is no task. A
    difference that is not finite is dropped.
    """
    value, base = pl.col("value"), pl.col("base_value")
    rows = table_of(tables, "evaluation").filter(
        pl.col("metric").is_in(list(METRICS)) & (pl.col("task") != HELD_OUT)
    )
    change = pl.when(pl.col("metric") == "acc").then(value - base).otherwise(value / base - 1)
    return (
        rows.with_columns(difference=100 * change)
        .filter(pl.col("difference").is_finite())
        .select(*KEYS, *DRAW, "task", "metric", "difference")
        .sort(*KEYS, *DRAW, "task", "metric")
    )


def tasks_of(rows: pl.DataFrame) -> list[str]:
    """The tasks with an accuracy, in the paper's order; others behind them by name."""
    found = set(rows.filter(metric="acc")["task"])
    return [t for t in TASKS if t in found] + sorted(found - set(TASKS))


def averages(rows: pl.DataFrame) -> pl.DataFrame:
    """The accuracy difference averaged over tasks, for each τ, draw and seed that has all tasks."""
    acc = rows.filter(metric="acc")
    mean = acc.group_by([*KEYS, *DRAW]).agg(
        pl.col("difference").mean(), n=pl.col("task").n_unique()
    )
    whole = mean.filter(pl.col("n") == len(tasks_of(rows)))
    return (
        whole.with_columns(task=pl.lit(AVERAGE), metric=pl.lit("acc"))
        .select(rows.columns)
        .sort(*KEYS, *DRAW)
    )


def by_tau(rows: pl.DataFrame) -> pl.DataFrame:
    """Mean and standard deviation over seeds and draws at each τ.

    Columns: KEYS, task, metric, mean, std (null of one), n.
    """
    keys = [*KEYS, "task", "metric"]
    value = pl.col("difference")
    spread = rows.group_by(keys).agg(mean=value.mean(), std=value.std(), n=pl.len().cast(pl.Int64))
    return (
        in_order(spread)
        .sort("_objective", "_strategy", "task", "metric", "tau")
        .drop("_objective", "_strategy")
    )


def in_order(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with `_objective` and `_strategy`, by which rows sort: integer programs first."""
    place = {name: i for i, name in enumerate((*OBJECTIVES, *STRATEGIES))}
    return frame.with_columns(
        pl.col(c).replace_strict(place, default=99, return_dtype=pl.Int64).alias(f"_{c}")
        for c in ("objective", "strategy")
    )


def shared_taus(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows at those τ at which every strategy of the objective was measured.

    Means over τ then compare like with like. Uniform plans, each with a τ of its own, are left out.
    """
    rows = rows.filter(~pl.col("strategy").str.starts_with("uniform_"))
    strategies = rows.group_by("objective").agg(_of=pl.col("strategy").n_unique())
    here = rows.group_by("objective", "tau").agg(_n=pl.col("strategy").n_unique())
    whole = here.join(strategies, on="objective").filter(pl.col("_n") == pl.col("_of"))
    return rows.join(whole.select("objective", "tau"), on=["objective", "tau"], how="semi")
