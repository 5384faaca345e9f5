"""What is delivered: of the plans that were measured, the one that gains most inside its bound on KL."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from mpq.program.anchors import Measured
from mpq.program.certainty import HALF, risk
from mpq.program.plan import Plan


def delivered(
    plan: Plan,
    rounds: Sequence[Sequence[Plan]],
    measured: Sequence[Measured],
    robust: float | None,
    text: str,
) -> Plan:
    """The plan to deliver in place of `plan`, the last round's, with what was measured of it and a note of how it came about.

    Plans that the integer program did not make, or not under a bound on KL, only get what was measured of them. Candidates
    are the program's plans of the same objective in any round: all keep the same constraints. `text` says what plans were
    measured on.
    """
    found = {_key(m.formats): m for m in measured}
    own = found.get(_key(plan.formats))
    if own is None:
        return plan
    bound, chosen, note = plan.kl_bound, plan, ""
    tried = [
        (p, m)
        for p in itertools.chain.from_iterable(rounds)
        if p.strategy == plan.strategy and (m := found.get(_key(p.formats)))
    ]
    if plan.strategy.startswith("ip_") and bound is not None:
        budget = math.inf if plan.budget is None else plan.budget
        inside = [
            p for p, m in tried if p.predicted_loss_mse <= budget and m.at_most(robust) <= bound
        ]
        if inside:
            best = max(inside, key=lambda p: p.predicted_gain)
            if own.at_most(robust) > bound or best.predicted_gain > plan.predicted_gain:
                chosen = best
        else:
            note = f"Measured, the plan's KL is {own.at_most(robust) / bound:.2f} times its bound; no plan that was tried is inside."
    own = found[_key(chosen.formats)]
    told = [
        {"scale": p.kl_scale, "predicted_kl": p.predicted_kl, "measured_kl": m.kl}
        for p, m in tried
        if (p.seed, p.kl_bound) == (plan.seed, bound)
    ]
    loss, half = chosen.predicted_loss_mse, chosen.predicted_loss_mse_error
    costs = {
        "kl": (own.kl, own.error),
        "loss_mse": (loss, None if half is None else half / HALF),
    }
    return replace(
        _rescaled(chosen, plan),
        tau=plan.tau,
        seed=plan.seed,
        budget=plan.budget,
        kl_bound=bound,
        risk=plan.risk if plan.risk is None else risk(costs, plan.budgets),
        checked_kl=own.kl,
        checked_kl_error=None if own.error is None else HALF * own.error,
        provenance=plan.provenance | {"check": {"text": text, "rounds": told, "note": note}},
    )


def _rescaled(plan: Plan, like: Plan) -> Plan:
    """A plan of an earlier round with its KL as predicted under the scale of a later one."""
    kl, half = plan.predicted_kl, plan.predicted_kl_error
    if kl is None or (plan.kl_scale, plan.kl_scale_error) == (like.kl_scale, like.kl_scale_error):
        return plan
    ratio = like.kl_scale / plan.kl_scale
    kl *= ratio
    if half is not None:  # the sensitivity's part as before, the scale's anew: anchors.scaled
        half = ratio * half + HALF * (like.kl_scale_error - plan.kl_scale_error) * kl
    return replace(
        plan,
        predicted_kl=kl,
        predicted_kl_error=half,
        predicted_loss_change=kl,
        kl_scale=like.kl_scale,
        kl_scale_error=like.kl_scale_error,
    )


def _key(formats: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(formats.items()))
