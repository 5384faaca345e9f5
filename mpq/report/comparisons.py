"""What plans cost, an objective's own strategy against its baselines: in accuracy, in loss MSE."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from mpq.report.accuracy import AVERAGE, averages, differences, name_of_task, shared_taus, tasks_of
from mpq.report.results import OBJECTIVES, Tables, table_of

LOSS = "loss_mse"


@dataclass(frozen=True)
class Comparison:
    """The difference of means (own − other), averaged over τ, and its standard error.

    The error is that of the two means, from repetitions: draws where a strategy has several, else
    seeds; None of one repetition. For accuracy that of the finite number of questions is in it,
    each strategy's paired with base.
    """

    objective: str
    own: str
    other: str
    quantity: str  # a task, their average, or LOSS
    difference: float  # points of accuracy; of the loss MSE the logarithm of the ratio
    error: float | None
    taus: int
    better: int  # of those τ, at how many the own strategy is better
    clearly: int  # and at how many by more than the standard error

    @property
    def clear(self) -> bool:
        """Whether the difference exceeds its standard error."""
        return self.error is not None and abs(self.difference) > self.error * (1 + 1e-6)


def compare_all(tables: Tables) -> list[Comparison]:
    """In loss MSE, and on each task with their average before them, where tasks were evaluated."""
    return [*_on_loss(tables), *_on_accuracy(tables)]


def _compare(
    rows: pl.DataFrame, quantity: str, sign: int, questions: Mapping[Any, float] | None = None
) -> list[Comparison]:
    """Each objective's ip_ strategy against the others; `sign` −1: less is better.

    Rows have KEYS, plan_seed, seed, difference. `questions` is the standard error from a task's
    finite number of questions, by (objective, strategy).
    """
    out = []
    for (objective,), of in shared_taus(rows).group_by(["objective"], maintain_order=True):
        own = f"ip_{objective}"
        others = [s for s in ("random", "prefix") if s in of["strategy"]]
        for other in others if own in of["strategy"] else ():
            finite = [(questions or {}).get((objective, s), 0.0) for s in (own, other)]
            gaps = [
                _gap(at, own, other, finite) for _, at in of.group_by(["tau"], maintain_order=True)
            ]
            # each repetition's mean over τ: what it shares across τ is not counted as independent
            difference, error = _gap(of, own, other, finite)
            out.append(
                Comparison(
                    str(objective),
                    own,
                    other,
                    quantity,
                    difference,
                    error,
                    taus=len(gaps),
                    better=sum(d * sign > 0 for d, _ in gaps),
                    clearly=sum(d * sign > 0 and e is not None and abs(d) > e for d, e in gaps),
                )
            )
    return out


def _gap(
    rows: pl.DataFrame, own: str, other: str, finite: Sequence[float]
) -> tuple[float, float | None]:
    """The difference of two strategies' means, and its standard error."""
    a, b = (_mean_error(_repeats(rows.filter(strategy=s))) for s in (own, other))
    known = a[1] is not None and b[1] is not None
    return a[0] - b[0], math.hypot(a[1], b[1], *finite) if known else None  # type: ignore[arg-type]


def _repeats(rows: pl.DataFrame) -> list[float]:
    """Independent repetitions of one strategy: the draws' means where there are several, else the
    seeds' values."""
    unit = "plan_seed" if rows["plan_seed"].n_unique() > 1 else "seed"
    means = rows.group_by(unit, maintain_order=True).agg(pl.col("difference").mean())
    return means["difference"].to_list()


def _mean_error(values: list[float]) -> tuple[float, float | None]:
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _on_accuracy(tables: Tables) -> list[Comparison]:
    rows = differences(tables)
    tasks = tasks_of(rows)
    acc = rows.filter(metric="acc")
    evaluation = table_of(tables, "evaluation").filter(pl.col("value").is_finite())
    error = evaluation.filter(metric="acc_diff_stderr")
    means = error.group_by("objective", "strategy", "task").agg(pl.col("value").mean() * 100)
    questions: dict[str, dict[Any, float]] = {task: {} for task in tasks}
    for objective, strategy, task, value in means.iter_rows():
        questions.setdefault(task, {})[objective, strategy] = value
    keys = {key for of in questions.values() for key in of}
    together = {
        key: math.hypot(*(questions[task].get(key, 0.0) for task in tasks)) / len(tasks)
        for key in keys
    }
    out = _compare(averages(rows), AVERAGE, 1, together) if len(tasks) > 1 else []
    for task in tasks:
        out += _compare(acc.filter(task=task), task, 1, questions[task])
    return out


def _on_loss(tables: Tables) -> list[Comparison]:
    """Loss MSE in logarithms: it runs over decades with τ, so that ratios are what averages over τ.

    A τ at which some plan lowers nothing has no ratio. It is left out for all strategies, or that
    plan's other τ would weigh more.
    """
    rows = table_of(tables, "evaluation").filter(metric=LOSS, task="loss")
    rows = rows.filter((pl.col("value") > 0).all().over("objective", "tau"))
    return _compare(rows.with_columns(difference=pl.col("value").log()), LOSS, -1)


def sentences_on(comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence for each objective on accuracy, and one on loss MSE."""
    on_tasks = [c for c in comparisons if c.quantity != LOSS]
    quantities = [c.quantity for c in on_tasks]
    shown = AVERAGE if AVERAGE in quantities else next(iter(quantities), "")
    what = "averaged over tasks" if shown == AVERAGE else f"on {name_of_task(shown)}"
    on_loss = [c for c in comparisons if c.quantity == LOSS]
    told = []
    for objective in OBJECTIVES:
        of = [c for c in on_tasks if c.quantity == shown and c.objective == objective]
        told += _sentence(of, f"Accuracy {what} and τ", _in_points)
    for objective in OBJECTIVES:
        of = [c for c in on_loss if c.objective == objective]
        told += _sentence(of, "Measured loss MSE under the same bound", _in_times)
    if any(c.difference > 0 for c in on_loss):
        told.append(
            "Under one bound, a strategy that gains more may use more of it: read the loss MSE "
            "together with the gain."
        )
    return told


def _sentence(of: Sequence[Comparison], what: str, words: Callable[[Comparison], str]) -> list[str]:
    if not of:
        return []
    parts = " and ".join(f"{words(c)} ({_verdict(c)})" for c in of)
    return [f"{what}, {OBJECTIVES[of[0].objective].name}: {of[0].own} is {parts}."]


def _in_points(c: Comparison) -> str:
    if f"{abs(c.difference):.2f}" == "0.00":
        return f"as accurate as {c.other}"
    return f"{abs(c.difference):.2f} points {'above' if c.difference > 0 else 'below'} {c.other}"


def _in_times(c: Comparison) -> str:
    return f"at {math.exp(c.difference):.2f} times that of {c.other}"


def _verdict(c: Comparison) -> str:
    if c.error is None:
        return "one repetition, so no standard error"
    return "more than the standard error" if c.clear else "within the standard error"


def comparison_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The comparisons as rows of the page's table."""
    names = {LOSS: "loss MSE (log of the ratio)", AVERAGE: "accuracy, average (points)"}
    clear = {None: "unknown", True: "yes", False: "no"}
    return [
        {
            **vars(c),
            "quantity": names.get(c.quantity, f"accuracy, {name_of_task(c.quantity)} (points)"),
            "clear": clear[None if c.error is None else c.clear],
        }
        for c in comparisons
    ]
