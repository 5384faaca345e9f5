"""Plans under a bound on KL are measured before they are delivered: solve, measure what was chosen, correct, solve again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mpq.flows.plans import make_plans
from mpq.flows.run import Calls, Run, announce
from mpq.flows.times import allowed_of
from mpq.program.anchors import Measured, Scale, corrected, fitted, measured_of
from mpq.program.costs import Costs
from mpq.spec import Objective
from mpq.store.entries import TableRef, content_key
from mpq.tasks import evaluation, planning
from mpq.tasks.stage import References, read, read_json

Formats = dict[str, str]


def checked_plans(
    run: Run, groups: TableRef, sums: References, text: TableRef, drawn: TableRef
) -> tuple[list[References], list[TableRef]]:
    """As make_plans, under the scales that measured plans give to the predicted KL; `drawn` tells of the `text`.

    Anchors, everything in each format, and the first solutions give one scale. Plans that are over their bound, or far inside,
    are solved again under what they say themselves, until nothing new is chosen or the spec's rounds are over; of all that
    were measured the best inside its bound is delivered.
    """
    bound = run.spec.bound
    objectives = [o for o in run.objectives if run.spec.checks_kl(o)]
    solved, timed = make_plans(run, groups, sums)
    if not (bound and objectives and run.evaluating):
        return solved, timed
    costs = Costs(read(sums["sensitivity"]), run.spec.noise_model, run.spec.model.base)
    rounds, known = [solved], dict[str, Measured]()
    anchors = [plan for o in objectives for plan in _anchors(run, groups, o)]
    wanted = [a for a in anchors if math.isfinite(costs.kl(a))]  # in which nothing overflows
    while True:
        chosen = {o: _chosen(run, rounds[-1], o) for o in objectives}
        wanted += [plan["formats"] for of in chosen.values() for plan in of.values()]
        new = _measured(run, wanted, known, costs, text)
        known |= new
        if len(rounds) == bound.rounds or (len(rounds) > 1 and not new):
            break
        of_all = fitted(list(known.values()))
        scales: dict[Objective, list[Scale]] = {}
        for objective, of in chosen.items():
            scales[objective] = []
            for limit in run.spec.limits(objective):
                scale = of_all
                if limit.kl and (plan := of.get(limit.kl)):
                    if len(rounds) > 1:
                        scale = Scale(plan["kl_scale"], plan["kl_scale_error"])
                    own = known[content_key(plan["formats"])]
                    scale = corrected(scale, own, limit.kl, bound.robust)
                scales[objective].append(scale)
        solved, timed = make_plans(run, groups, sums, scales)
        rounds.append(solved)
    delivered = _delivered(run, rounds, known, drawn)
    files = [p for found in delivered for p in read_json(found["plan_files"])]
    for plan in files:
        if note := plan["provenance"].get("check", {}).get("note"):
            announce(f"{plan['strategy']} under KL ≤ {plan['kl_bound']:.3g}: {note}")
    return delivered, timed


def _anchors(run: Run, groups: TableRef, objective: Objective) -> list[Formats]:
    """Everything in each format, where it may be in it."""
    of = allowed_of(run, groups, objective)
    return [
        {op: f if f in may else may[0] for op, may in of.formats.items()}
        for f in run.objectives[objective].formats
    ]


def _chosen(
    run: Run, solved: list[References], objective: Objective
) -> dict[float | None, dict[str, Any]]:
    """The plans of an objective's program under bounds on KL, by the bound."""
    files = read_json(solved[list(run.objectives).index(objective)]["plan_files"])
    own = [p for p in files if p["strategy"] == f"ip_{objective}"]
    return {p["kl_bound"]: p for p in own if p["kl_bound"] is not None}


def _measured(
    run: Run, plans: list[Formats], known: Mapping[str, Measured], costs: Costs, text: TableRef
) -> dict[str, Measured]:
    """The plans that are not known yet, measured on the text, a task each."""
    new = {key: formats for formats in plans if (key := content_key(formats)) not in known}
    calls: dict[str, dict[str, Any]] = {}
    for number, formats in enumerate(new.values(), len(known) + 1):
        calls[f"plan {number}"] = {
            "weights": run.weights,
            "formats": formats,
            "blocks": text,
            "batch": run.held_out.batch,
            "what": f"plan {number}",
        }
    found = run.map(evaluation.measure_kl, calls) if calls else []
    measured = {}
    for (key, formats), ref in zip(new.items(), found, strict=True):
        predicted = costs.kl(formats)
        measured[key] = measured_of(formats, predicted, read(ref["block_kl"])["kl"].to_list())
    return measured


def _delivered(
    run: Run, rounds: list[list[References]], known: Mapping[str, Measured], drawn: TableRef
) -> list[References]:
    from mpq.evaluation.sampling import CHECKED_ON, in_words

    said = in_words(read(drawn)).get(CHECKED_ON, "documents of the tasks that do not calibrate")
    calls: Calls = {
        objective: {
            "plan_files": [solved[i]["plan_files"] for solved in rounds],
            "solutions": rounds[-1][i]["solutions"],
            "measured": list(known.values()),
            "robust": run.spec.bound.robust if run.spec.bound else None,
            "text": said,
        }
        for i, objective in enumerate(run.objectives)
    }
    found = run.map(planning.deliver, calls)
    return [{**last, **new} for last, new in zip(rounds[-1], found, strict=True)]
