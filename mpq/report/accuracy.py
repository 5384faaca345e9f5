"""What plans cost on tasks: differences of accuracy to the base model, for each seed, τ and strategy, and Table 1.

Accuracy differences are in percentage points (100 × the difference of fractions), perplexity differences in percent of the
base model's perplexity, both paired: each measurement minus the base's own beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from mpq.report.results import OBJECTIVES, STRATEGIES, Tables, table_of

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
KEYS = ["objective", "strategy", "tau"]
DRAW = ["plan_seed", "seed"]


def name_of_task(task: str) -> str:
    """The task's name for people; other harness tasks keep theirs."""
    return TASKS.get(task, task)


def differences(tables: Tables) -> pl.DataFrame:
    """Each measurement's difference to base: KEYS, plan_seed, seed, task, metric (acc, perplexity), difference.

    Points for `acc`, percent for `perplexity`; the held-out text is no task. A difference that is not finite is dropped.
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
    found = set(rows.filter(pl.col("metric") == "acc")["task"])
    return [t for t in TASKS if t in found] + sorted(found - set(TASKS))


def averages(rows: pl.DataFrame) -> pl.DataFrame:
    """The accuracy difference averaged over tasks, for each τ, draw and seed that was measured on every task."""
    acc = rows.filter(pl.col("metric") == "acc")
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
    """Mean and standard deviation over seeds and draws at each τ: KEYS, task, metric, mean, std (null of one), n."""
    keys = [*KEYS, "task", "metric"]
    value = pl.col("difference")
    spread = rows.group_by(keys).agg(mean=value.mean(), std=value.std(), n=pl.len().cast(pl.Int64))
    return (
        in_order(spread)
        .sort("_objective", "_strategy", "task", "metric", "tau")
        .drop("_objective", "_strategy")
    )


def in_order(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with `_objective` and `_strategy`, by which rows sort as people expect: integer programs first."""
    place = {name: i for i, name in enumerate((*OBJECTIVES, *STRATEGIES))}
    return frame.with_columns(
        pl.col(c).replace_strict(place, default=99, return_dtype=pl.Int64).alias(f"_{c}")
        for c in ("objective", "strategy")
    )


def shared_taus(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows at those τ at which every strategy of the objective was measured, so that means over τ compare like with like."""
    strategies = rows.group_by("objective").agg(_of=pl.col("strategy").n_unique())
    here = rows.group_by("objective", "tau").agg(_n=pl.col("strategy").n_unique())
    whole = here.join(strategies, on="objective").filter(pl.col("_n") == pl.col("_of"))
    return rows.join(whole.select("objective", "tau"), on=["objective", "tau"], how="semi")


def table_1(tables: Tables) -> pl.DataFrame:
    """Table 1: a row for each objective and strategy; `<column>` and `<column>_std` for each task and for their average.

    As the paper: at each τ mean and standard deviation over seeds (and random's draws), then both averaged over τ; the
    average column is the mean over tasks of means and of standard deviations. Only τ that all strategies of the objective
    share. Columns are `<task>_acc` (points) and `<task>_perplexity` (%); `taus` and `repeats` say over how many. Empty
    where no task was evaluated.
    """
    rows = shared_taus(differences(tables))
    each = (
        by_tau(rows)
        .group_by("objective", "strategy", "task", "metric")
        .agg(
            pl.col("mean").mean(),
            pl.col("std").mean(),
            taus=pl.col("tau").n_unique(),
            repeats=pl.col("n").min(),
        )
    )
    out: list[dict[str, object]] = []
    for (objective, strategy), of in each.group_by("objective", "strategy", maintain_order=True):
        row: dict[str, object] = {"objective": objective, "strategy": strategy}
        cells = {(r["task"], r["metric"]): (r["mean"], r["std"]) for r in of.iter_rows(named=True)}
        for task in tasks_of(rows):
            for metric in ("perplexity", "acc") if _has(rows, task, "perplexity") else ("acc",):
                row[f"{task}_{metric}"], row[f"{task}_{metric}_std"] = cells.get(
                    (task, metric), (None, None)
                )
        here = [cells.get((task, "acc"), (None, None)) for task in tasks_of(rows)]
        row[f"{AVERAGE}_acc"], row[f"{AVERAGE}_acc_std"] = (
            _mean([m for m, _ in here]),
            _mean([s for _, s in here]),
        )
        out.append({**row, "taus": of["taus"].min(), "repeats": of["repeats"].min()})
    if not out:
        return pl.DataFrame(schema={"objective": pl.String, "strategy": pl.String})
    return (
        in_order(pl.DataFrame(out, infer_schema_length=None))
        .sort("_objective", "_strategy", "strategy")
        .drop("_objective", "_strategy")
    )


def _has(rows: pl.DataFrame, task: str, metric: str) -> bool:
    return not rows.filter((pl.col("task") == task) & (pl.col("metric") == metric)).is_empty()


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there and len(there) == len(values) else None


def columns_of(table: pl.DataFrame) -> list[tuple[str, str]]:
    """Table 1's columns of numbers as (column, heading)."""
    found = [c.removesuffix("_std") for c in table.columns if c.endswith("_std")]
    split = [(c, *c.rsplit("_", 1)) for c in found]
    return [(c, f"{name_of_task(task)} {METRICS[metric]}") for c, task, metric in split]


def markdown(table: pl.DataFrame) -> str:
    """Table 1 as Markdown, `mean ± std` in each cell, the best strategy of each objective in bold."""
    columns = columns_of(table)
    lines = [
        f"| {' | '.join(['Objective', 'Strategy', *(h for _, h in columns)])} |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for row in table.iter_rows(named=True):
        rivals = table.filter(pl.col("objective") == row["objective"])
        cells = []
        for column, _ in columns:
            rounded = rivals[column].round(3)  # what reads the same is as good
            best = rounded.min() if column.endswith("_perplexity") else rounded.max()
            text = cell(row[column], row[f"{column}_std"])
            cells.append(
                f"**{text}**"
                if row[column] is not None and round(row[column], 3) == best and rivals.height > 1
                else text
            )
        lines.append(f"| {row['objective']} | {row['strategy']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", how_averaged(table), ""])


def cell(mean: float | None, std: float | None) -> str:
    """`−0.463 ± 0.30`, the mean alone where there was one measurement, – where none."""
    if mean is None:
        return "–"
    text = f"{round(mean, 3) + 0.0:.3f}".replace("-", "−")  # no negative zero
    return text if std is None else f"{text} ± {std:.2f}"


def how_averaged(table: pl.DataFrame) -> str:
    """The sentence under Table 1 that says what was averaged over what."""
    taus, repeats = (sorted(set(table[c])) for c in ("taus", "repeats"))
    counts = [f"{' to '.join(map(str, dict.fromkeys((v[0], v[-1]))))}" for v in (taus, repeats)]
    return (
        f"Difference to the base model: at each τ mean ± standard deviation over seeds (and the draws of random), then both averaged over "
        f"the {counts[0]} τ that all strategies of an objective share, as in the paper; {counts[1]} repetitions at each τ. Accuracy in percentage points, "
        "perplexity in percent. The average is that of the tasks' means and of their standard deviations. The spread is that of the seeds "
        "alone: that a task has finitely many questions is not in it."
    )


def for_people(table: pl.DataFrame) -> pl.DataFrame:
    """Table 1 in columns that fit a terminal: `mean ± std` of each task's accuracy in points, perplexity in percent."""
    names = {
        c: name_of_task(c.rsplit("_", 1)[0]) + (" ppl %" if c.endswith("_perplexity") else "")
        for c, _ in columns_of(table)
    }
    rows = [
        {
            "for": row["objective"],
            "strategy": row["strategy"],
            **{
                name.removesuffix(" of the tasks"): _short(row[c], row[f"{c}_std"])
                for c, name in names.items()
            },
        }
        for row in table.iter_rows(named=True)
    ]
    return pl.DataFrame(rows)


def _short(mean: float | None, std: float | None) -> str:
    return (
        "–"
        if mean is None
        else f"{mean:.1f}{'' if std is None else f'±{std:.1f}'}".replace("-", "−")
    )
