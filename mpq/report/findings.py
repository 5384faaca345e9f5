"""What the numbers say, in sentences: who wins and whether that exceeds the standard error, and where an assumption breaks.

The assumptions are those of the integer program: loss MSE adds up over ops, time gains over groups. Both are checked by the
ratio of what was measured to what was predicted, over all plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from mpq.report.accuracy import AVERAGE, averages, differences, name_of_task, shared_taus, tasks_of
from mpq.report.results import OBJECTIVES, RATIO_RANGE, Tables, plan_results, table_of
from mpq.timing.drift import drift_of

TTFT_ERROR = (
    0.05  # a median |measured / predicted − 1| of TTFT above it breaks the additivity of time
)
GAIN_R2 = 0.9  # below it the predicted time gains explain too little of the measured ones
ENOUGH_PLANS = 50  # as many plans as the paper's kind of check should have


@dataclass(frozen=True)
class Additivity:
    """Measured over predicted of one quantity, over the different plans of an objective (or of all) that have both above zero:
    quantiles 5, 50, 95 % and the median error."""

    quantity: str
    objective: str
    plans: int
    low: float
    median: float
    high: float
    error: float  # median |measured / predicted − 1|


@dataclass(frozen=True)
class Comparison:
    """An objective's own strategy against another: the difference of means (own − other), averaged over τ, and its standard error.

    The error is that of the two means, from repetitions: draws where a strategy has several, else seeds; None of one. For accuracy
    that of the finite number of questions is in it, each strategy's paired with base.
    """

    objective: str
    own: str
    other: str
    quantity: str
    difference: float
    error: float | None
    taus: int
    better: int  # of those τ, at how many the own strategy is better
    clearly: int  # and at how many by more than the standard error

    @property
    def clear(self) -> bool:
        """Whether the difference exceeds its standard error."""
        return self.error is not None and abs(self.difference) > self.error * (1 + 1e-6)


@dataclass(frozen=True)
class Findings:
    """Sentences and warnings for the report, and the numbers behind them."""

    additivity: list[Additivity] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    gain_r2: float | None = (
        None  # of the measured time gains on the predicted ones, all different plans
    )
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find(tables: Tables) -> Findings:
    """Everything above, from the tables alone; what they do not hold is left out."""
    found = Findings(
        additivity_of(tables), [*_on_loss(tables), *_on_accuracy(tables)], gain_r2_of(tables)
    )
    _tell_accuracy(found)
    _tell_loss(found)
    changed = drift_of(plan_results(tables))
    found.warnings.extend([changed] if changed else [])
    _tell_additivity(
        found, "The machine's own changes of speed are part of that. " if changed else ""
    )
    return found


def additivity_of(tables: Tables) -> list[Additivity]:
    """The ratio measured / predicted of loss MSE (all plans, and each objective's), TTFT and time gain.

    Plans with equal formats, whatever strategy or τ made them, were measured once and count once. Times are carried to the speed that the
    machine had while configurations were timed (drift.py): a change of it breaks no sum.
    """
    plans = plan_results(tables)
    timed = plans.filter(pl.col("objective") == "et")
    loss = ("measured_loss_mse", "predicted_loss_mse")
    pairs = [
        ("loss MSE", "all", plans, *loss),
        *(
            ("loss MSE", o, plans.filter(pl.col("objective") == o), *loss)
            for o in OBJECTIVES
            if plans["objective"].n_unique() > 1
        ),
        ("TTFT", "et", timed, "carried_ttft_s", "predicted_ttft_s"),
        ("time gain", "et", timed, "carried_gain_s", "predicted_gain"),
    ]
    out = []
    for name, objective, frame, measured, predicted in pairs:
        both = frame.filter((pl.col(predicted) > 0) & pl.col(measured).is_finite()).unique(
            measured
        )  # one measurement, one plan
        ratio = both.select(r=pl.col(measured) / pl.col(predicted))["r"]
        if ratio.len():
            low, median, high = (float(ratio.quantile(q, "linear") or 0) for q in (0.05, 0.5, 0.95))
            out.append(
                Additivity(
                    name,
                    objective,
                    ratio.len(),
                    low,
                    median,
                    high,
                    float((ratio - 1).abs().median() or 0),  # type: ignore[arg-type]
                )
            )
    return out


def gain_r2_of(tables: Tables) -> float | None:
    """R² of the predicted time gains, losses of time included; None of fewer than three different plans."""
    plans = plan_results(tables).filter(
        (pl.col("objective") == "et")
        & pl.col("carried_gain_s").is_finite()
        & pl.col("predicted_gain").is_finite()
    )
    plans = plans.unique("measured_ttft_s")
    measured = plans["carried_gain_s"].to_numpy()
    if len(measured) < 3 or not measured.var():
        return None
    return float(1 - ((measured - plans["predicted_gain"].to_numpy()) ** 2).mean() / measured.var())


def _repeats(rows: pl.DataFrame) -> list[float]:
    """Independent repetitions of one strategy at one τ: the draws' means where there are several, else the seeds' values."""
    unit = "plan_seed" if rows["plan_seed"].n_unique() > 1 else "seed"
    return (
        rows.group_by(unit, maintain_order=True)
        .agg(pl.col("difference").mean())["difference"]
        .to_list()
    )


def _mean_error(values: list[float]) -> tuple[float, float | None]:
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(
        math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)
    )


def _compare(
    rows: pl.DataFrame, quantity: str, sign: int, questions: Mapping[Any, float] | None = None
) -> list[Comparison]:
    """Each objective's ip_ strategy against the others, on rows with KEYS, plan_seed, seed, difference; `sign` −1: less is better.

    `questions` is the standard error from a task's finite number of questions, by (objective, strategy).
    """
    out = []
    for (objective,), of in shared_taus(rows).group_by(["objective"], maintain_order=True):
        own = f"ip_{objective}"
        others = [s for s in ("random", "prefix") if s in of["strategy"]]
        for other in others if own in of["strategy"] else ():
            finite = [(questions or {}).get((objective, s), 0.0) for s in (own, other)]
            gaps: list[tuple[float, float | None]] = []
            for (_,), at in of.group_by(["tau"], maintain_order=True):
                a, b = (
                    _mean_error(_repeats(at.filter(pl.col("strategy") == s))) for s in (own, other)
                )
                gaps.append(
                    (
                        a[0] - b[0],
                        None if a[1] is None or b[1] is None else math.hypot(a[1], b[1], *finite),
                    )
                )
            # over τ: the mean of each repetition over τ, so that what repetitions share across τ is not counted as independent
            a, b = (_mean_error(_repeats(of.filter(pl.col("strategy") == s))) for s in (own, other))
            error = None if a[1] is None or b[1] is None else math.hypot(a[1], b[1], *finite)
            better = [d * sign > 0 for d, _ in gaps]
            clearly = [d * sign > 0 and e is not None and abs(d) > e for d, e in gaps]
            out.append(
                Comparison(
                    str(objective),
                    own,
                    other,
                    quantity,
                    a[0] - b[0],
                    error,
                    len(gaps),
                    sum(better),
                    sum(clearly),
                )
            )
    return out


def _on_accuracy(tables: Tables) -> list[Comparison]:
    rows = differences(tables)
    tasks = tasks_of(rows)
    acc = rows.filter(pl.col("metric") == "acc")
    error = table_of(tables, "evaluation").filter(
        (pl.col("metric") == "acc_diff_stderr") & pl.col("value").is_finite()
    )
    means = error.group_by("objective", "strategy", "task").agg(pl.col("value").mean() * 100)
    questions: dict[str, dict[Any, float]] = {
        task: {
            (o, s): v
            for o, s, v in means.filter(pl.col("task") == task)
            .select("objective", "strategy", "value")
            .iter_rows()
        }
        for task in tasks
    }
    keys = {key for of in questions.values() for key in of}
    together = {
        key: math.hypot(*(of.get(key, 0.0) for of in questions.values())) / len(tasks)
        for key in keys
    }
    out = _compare(averages(rows), AVERAGE, 1, together) if len(tasks) > 1 else []
    for task in tasks:
        out += _compare(acc.filter(pl.col("task") == task), task, 1, questions[task])
    return out


def _on_loss(tables: Tables) -> list[Comparison]:
    """Loss MSE in logarithms (base e): its scale runs over decades with τ, so that ratios are what averages over τ.

    A τ at which some plan lowers nothing has no ratio and is left out for all, or that plan's other τ would weigh more.
    """
    rows = table_of(tables, "evaluation").filter(
        (pl.col("metric") == "loss_mse") & (pl.col("task") == "loss")
    )
    rows = rows.filter((pl.col("value") > 0).all().over("objective", "tau"))
    return _compare(rows.with_columns(difference=pl.col("value").log()), "loss_mse", -1)


def _tell_accuracy(found: Findings) -> None:
    on_tasks = [c for c in found.comparisons if c.quantity != "loss_mse"]
    quantity = (
        AVERAGE
        if any(c.quantity == AVERAGE for c in on_tasks)
        else next((c.quantity for c in on_tasks), None)
    )
    what = "averaged over tasks" if quantity == AVERAGE else f"on {name_of_task(quantity or '')}"

    def words(c: Comparison) -> str:
        if f"{abs(c.difference):.2f}" == "0.00":
            return f"as accurate as {c.other}"
        return (
            f"{abs(c.difference):.2f} points {'above' if c.difference > 0 else 'below'} {c.other}"
        )

    for objective in OBJECTIVES:
        _tell_one(
            found,
            objective,
            [c for c in on_tasks if c.quantity == quantity],
            f"Accuracy {what} and τ",
            words,
            "points",
        )


def _tell_loss(found: Findings) -> None:
    def words(c: Comparison) -> str:
        ratio = math.exp(c.difference)
        return f"{ratio:.2f} times that of {c.other}"

    for objective in OBJECTIVES:
        of = [c for c in found.comparisons if c.quantity == "loss_mse"]
        _tell_one(
            found,
            objective,
            of,
            "Measured loss MSE at matched τ, geometric mean",
            words,
            "in the logarithm",
        )
    if any(c.quantity == "loss_mse" and c.difference > 0 for c in found.comparisons):
        found.sentences.append(
            "At one τ all strategies have the same bound on the loss MSE, and one that gains more may use more of it: "
            "read the loss MSE together with the gain (figure 4)."
        )


def _tell_one(
    found: Findings,
    objective: str,
    of: list[Comparison],
    what: str,
    words: Callable[[Comparison], str],
    unit: str,
) -> None:
    parts = []
    for c in of:
        if c.objective != objective:
            continue
        if c.error is None:
            verdict = "one repetition, so no standard error"
        else:
            verdict = (
                f"{'more' if c.clear else 'not more'} than the standard error, {c.error:.2g} {unit}"
            )
        parts.append(
            f"{words(c)} ({verdict}; better at {c.better} of {c.taus} τ, at {c.clearly} by more than the standard error)"
        )
    if parts:
        own = next(c.own for c in of if c.objective == objective)
        found.sentences.append(
            f"{what}, {OBJECTIVES[objective].name}: {own} is {' and '.join(parts)}."
        )


def _tell_additivity(found: Findings, why: str = "") -> None:
    on_loss = [(a.quantity, a.objective) for a in found.additivity if a.quantity == "loss MSE"]
    roughly = on_loss[1:] or on_loss  # each objective by itself, where there are several
    for a in found.additivity:
        if a.objective == "all" or a.quantity != "loss MSE":
            found.sentences.append(
                f"Additivity of {a.quantity}: measured is {a.median:.3g} times predicted in the median of {a.plans} different plans "
                f"(5 to 95 %: {a.low:.3g} to {a.high:.3g}; median error {a.error:.1%})."
            )
        if a.quantity == "loss MSE" and not RATIO_RANGE[0] <= a.median <= RATIO_RANGE[1]:
            found.warnings.append(
                f"The loss MSE does not add up over ops {'here' if a.objective == 'all' else f'in the plans for {a.objective}'}: "
                f"measured is {a.median:.2g} times predicted in the median of {a.plans} plans, "
                f"outside {RATIO_RANGE[0]:g} to {RATIO_RANGE[1]:g}. The plans' bounds on the loss are not what they say."
            )
        elif (a.quantity, a.objective) in roughly and not (
            RATIO_RANGE[0] <= a.low and a.high <= RATIO_RANGE[1]
        ):
            found.warnings.append(
                f"The loss MSE adds up over ops only roughly {'here' if a.objective == 'all' else f'in the plans for {a.objective}'}: "
                f"measured is {a.low:.2g} to {a.high:.2g} times predicted (5 to 95 % of {a.plans} plans), "
                f"beyond {RATIO_RANGE[0]:g} to {RATIO_RANGE[1]:g}. Leave the bound a margin."
            )
        if a.quantity == "TTFT" and a.error > TTFT_ERROR:
            found.warnings.append(
                f"The time gains do not add up over groups here: measured TTFT, at one speed of the machine, leaves the predicted one by {a.error:.1%} in "
                f"the median of {a.plans} plans, above {TTFT_ERROR:.0%}. {why}Trust the measured times, not the predicted ones."
            )
    if found.gain_r2 is not None:
        found.sentences.append(
            f"Predicted time gains, losses of time among them, explain the measured ones with R² = {found.gain_r2:.3f}."
        )
        if found.gain_r2 < GAIN_R2:
            found.warnings.append(
                f"The time gains do not add up over groups here: predicted gains explain the measured ones with R² = {found.gain_r2:.2f}, "
                f"below {GAIN_R2:g}. {why}Trust the measured times, not the predicted ones."
            )
    short = [
        a
        for a in found.additivity
        if (a.quantity, a.objective) == ("loss MSE", "all") and a.plans < ENOUGH_PLANS
    ]
    if short:
        found.sentences.append(
            f"{short[0].plans} plans are few to judge additivity by: {ENOUGH_PLANS} or more are advised."
        )


def rows_of(found: Findings) -> dict[str, list[dict[str, Any]]]:
    """The findings as rows of the page's tables."""
    names = {"loss_mse": "loss MSE (log of the ratio)", AVERAGE: "accuracy, average (points)"}
    return {
        "additivity": [vars(a) for a in found.additivity],
        "comparisons": [
            {
                **vars(c),
                "quantity": names.get(c.quantity, f"accuracy, {name_of_task(c.quantity)} (points)"),
                "clear": _clear(c),
            }
            for c in found.comparisons
        ],
    }


def _clear(c: Comparison) -> str:
    return "unknown" if c.error is None else "yes" if c.clear else "no"
