"""Table 1: what each strategy costs on each task, mean ± standard deviation, averaged over τ."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from mpq.program.plan import is_uniform
from mpq.report.accuracy import (
    AVERAGE,
    METRICS,
    by_tau,
    differences,
    in_order,
    name_of_task,
    shared_taus,
    tasks_of,
)
from mpq.report.results import Tables


def table_1(tables: Tables) -> pl.DataFrame:
    """Table 1: a row for each objective and strategy, two columns for each task and their average.

    As the paper: at each τ mean and standard deviation over seeds (and random's draws), then both
    averaged over the τ that all strategies of the objective share. The average column is the mean
    over tasks of means and of standard deviations. Uniform plans, each of one τ, stand last.
    Columns are `<task>_acc` (points), `<task>_perplexity` (%) and theirs with `_std`; `taus` and
    `repeats` say over how many. Empty where no task was evaluated.
    """
    measured = differences(tables)
    uniform = measured.filter(pl.col("strategy").str.starts_with("uniform_"))
    rows = pl.concat([shared_taus(measured), uniform])
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
    return not rows.filter(task=task, metric=metric).is_empty()


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
        rivals = _of_strategies(table).filter(pl.col("objective") == row["objective"])
        cells = []
        for column, _ in columns:
            rounded = rivals[column].round(3)  # what reads the same is as good
            best = rounded.min() if column.endswith("_perplexity") else rounded.max()
            text, value = cell(row[column], row[f"{column}_std"]), row[column]
            first = value is not None and round(value, 3) == best and rivals.height > 1
            cells.append(f"**{text}**" if first and not is_uniform(row["strategy"]) else text)
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
    under_tau = _of_strategies(table)
    counts = [
        " to ".join(map(str, dict.fromkeys((of.min(), of.max()))))
        for of in (under_tau["taus"], under_tau["repeats"])
    ]
    return (
        "Difference to the base model: at each τ mean ± standard deviation over seeds (and the "
        f"draws of random), then both averaged over the {counts[0]} τ that all strategies of an "
        f"objective share, as in the paper; {counts[1]} repetitions at each τ. "
        + ("" if under_tau.height == table.height else "Uniform plans are of one τ each. ")
        + "Accuracy in percentage points, perplexity in percent. The average is that of the tasks' "
        "means and of their standard deviations. The spread is that of the seeds alone: that a "
        "task has finitely many questions is not in it."
    )


def _of_strategies(table: pl.DataFrame) -> pl.DataFrame:
    """The rows of strategies that know τ, or all where there are no others."""
    rows = table.filter(~pl.col("strategy").str.starts_with("uniform_"))
    return table if rows.is_empty() else rows


def for_people(table: pl.DataFrame) -> pl.DataFrame:
    """Table 1 in columns that fit a terminal.

    `mean±std` of each task's accuracy difference in points, of perplexity in percent.
    """
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
    if mean is None:
        return "–"
    return f"{mean:.1f}{'' if std is None else f'±{std:.1f}'}".replace("-", "−")
