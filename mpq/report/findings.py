"""Whether predictions hold, in numbers and sentences: loss MSE has to add up over ops, and time
gains over groups, or the integer program chooses by what is not so.

Both are checked by the ratio of what was measured to what was predicted, over all plans.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from mpq.program.plan import has_tau
from mpq.report.comparisons import Comparison, compare_all, sentences_on
from mpq.report.results import OBJECTIVES, RATIO_RANGE, Tables, plan_results
from mpq.timing.drift import drift_of

TTFT_ERROR = 0.05  # a median |measured / predicted − 1| of TTFT above it breaks the sum of times
GAIN_R2 = 0.9  # below it the predicted time gains explain too little of the measured ones
ENOUGH_PLANS = 50  # as many plans as the paper's kind of check should have


@dataclass(frozen=True)
class Additivity:
    """Measured over predicted of one quantity: quantiles over plans, and the median error.

    Over the different plans of an objective (or of all) that have both, above zero.
    """

    quantity: str
    objective: str
    plans: int
    low: float  # 5 % quantile
    median: float
    high: float  # 95 % quantile
    error: float  # median |measured / predicted − 1|


@dataclass(frozen=True)
class Findings:
    """Sentences and warnings for the report, and the numbers behind them."""

    additivity: list[Additivity] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    gain_r2: float | None = None  # of measured time gains on predicted ones, all different plans
    sentences: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find(tables: Tables) -> Findings:
    """Everything above, from the tables alone; what they do not hold is left out."""
    found = Findings(additivity_of(tables), compare_all(tables), gain_r2_of(tables))
    found.sentences.extend(sentences_on(found.comparisons))
    changed = drift_of(plan_results(tables))
    found.warnings.extend([changed] if changed else [])
    _say_loss(found, bounds_loss(plan_results(tables)))
    _say_kl(found)
    _say_times(found, "The machine's own changes of speed are part of that. " if changed else "")
    return found


def additivity_of(tables: Tables) -> list[Additivity]:
    """Measured over predicted loss MSE (of all plans, and each objective's), KL, TTFT and time gain.

    Plans with equal formats, whatever strategy or τ made them, were measured once and count once.
    Times are carried to the speed that the machine had while configurations were timed (drift.py):
    a change of it breaks no sum.
    """
    plans = plan_results(tables)
    timed = plans.filter(objective="et")
    loss = ("measured_loss_mse", "predicted_loss_mse")
    found = [_additivity("loss MSE", "all", plans, *loss)]
    if plans["objective"].n_unique() > 1:
        for objective in OBJECTIVES:
            of = plans.filter(objective=objective)
            found.append(_additivity("loss MSE", objective, of, *loss))
    found.append(_additivity("KL", "all", plans, "measured_kl", "predicted_kl"))
    found.append(_additivity("TTFT", "et", timed, "carried_ttft_s", "predicted_ttft_s"))
    found.append(
        _additivity("time per output token", "et", timed, "carried_tpot_s", "predicted_tpot_s")
    )
    found.append(_additivity("time gain", "et", timed, "carried_gain_s", "predicted_gain"))
    return [a for a in found if a]


def _additivity(
    quantity: str, objective: str, plans: pl.DataFrame, measured: str, predicted: str
) -> Additivity | None:
    both = plans.filter((pl.col(predicted) > 0) & pl.col(measured).is_finite())
    one_each = both.unique(measured)  # one measurement, one plan
    ratio = one_each.select(r=pl.col(measured) / pl.col(predicted))["r"]
    if ratio.is_empty():
        return None
    low, median, high = (float(ratio.quantile(q, "linear") or 0) for q in (0.05, 0.5, 0.95))
    error = float((ratio - 1).abs().median() or 0)  # type: ignore[arg-type]
    return Additivity(quantity, objective, ratio.len(), low, median, high, error)


def gain_r2_of(tables: Tables) -> float | None:
    """R² of the predicted time gains, losses of time included; None of fewer than three plans."""
    both = pl.all_horizontal(pl.col("carried_gain_s", "predicted_gain").is_finite())
    plans = plan_results(tables).filter(both, objective="et").unique("measured_ttft_s")
    measured = plans["carried_gain_s"].to_numpy()
    if len(measured) < 3 or not measured.var():
        return None
    return float(1 - ((measured - plans["predicted_gain"].to_numpy()) ** 2).mean() / measured.var())


def bounds_loss(plans: pl.DataFrame) -> bool:
    """Whether some plan's loss MSE is bounded, by τ: where KL alone is, its errors break no bound."""
    own = plans.filter(pl.col("budget").is_not_null())["strategy"]
    return any(map(has_tau, own)) or plans["kl_bound"].is_null().all()


def _say_kl(found: Findings) -> None:
    for a in (a for a in found.additivity if a.quantity == "KL"):
        found.sentences.append(_measured_over_predicted("KL divergence", a))


def _say_loss(found: Findings, bounded: bool) -> None:
    """On the sum over ops, of each objective by itself where there are several.

    There are warnings only where the loss is `bounded`.
    """
    on_loss = [a for a in found.additivity if a.quantity == "loss MSE"]
    for a in (a for a in on_loss if a.objective == "all"):
        found.sentences.append(_measured_over_predicted("loss MSE", a))
        if a.plans < ENOUGH_PLANS:
            found.sentences.append(
                f"{a.plans} plans are few to judge predictions by: {ENOUGH_PLANS} or more are "
                "advised."
            )
    for a in on_loss if bounded else ():
        where = "here" if a.objective == "all" else f"in the plans for {a.objective}"
        roughly = a in (on_loss[1:] or on_loss)
        if not RATIO_RANGE[0] <= a.median <= RATIO_RANGE[1]:
            found.warnings.append(
                f"The loss MSE does not add up over ops {where}: measured is {a.median:.2g} times "
                f"predicted in the median of {a.plans} plans, outside {RATIO_RANGE[0]:g} to "
                f"{RATIO_RANGE[1]:g}. The plans' bounds on the loss are not what they say."
            )
        elif roughly and not (RATIO_RANGE[0] <= a.low and a.high <= RATIO_RANGE[1]):
            found.warnings.append(
                f"The loss MSE adds up over ops only roughly {where}: measured is {a.low:.2g} to "
                f"{a.high:.2g} times predicted (5 to 95 % of {a.plans} plans), beyond "
                f"{RATIO_RANGE[0]:g} to {RATIO_RANGE[1]:g}. Leave the bound a margin."
            )


def _say_times(found: Findings, why: str) -> None:
    """On the sum over groups; `why` is what else may be behind an error."""
    for a in (a for a in found.additivity if a.quantity in ("TTFT", "time gain")):
        name = "time to first token" if a.quantity == "TTFT" else "time saved"
        found.sentences.append(_measured_over_predicted(name, a))
        if a.quantity == "TTFT" and a.error > TTFT_ERROR:
            found.warnings.append(
                "The time gains do not add up over groups here: measured time to first token, "
                f"scaled to one speed of the machine, is off the predicted one by {a.error:.1%} in "
                f"the median of {a.plans} plans, above {TTFT_ERROR:.0%}. {why}"
                "Trust the measured times, not the predicted ones."
            )
    if found.gain_r2 is None:
        return
    found.sentences.append(
        f"Predicted time gains explain the measured ones with R² = {found.gain_r2:.3f}, plans that "
        "lose time among them."
    )
    if found.gain_r2 < GAIN_R2:
        found.warnings.append(
            "The time gains do not add up over groups here: predicted gains explain the measured "
            f"ones with R² = {found.gain_r2:.2f}, below {GAIN_R2:g}. {why}"
            "Trust the measured times, not the predicted ones."
        )


def _measured_over_predicted(name: str, a: Additivity) -> str:
    return (
        f"Measured {name} is {a.median:.3g} times the predicted one in the median of {a.plans} "
        f"different plans (5 to 95 %: {a.low:.3g} to {a.high:.3g}; median error {a.error:.1%})."
    )
