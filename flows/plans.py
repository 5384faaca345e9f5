"""From sensitivity and times to plans: gains, solve, measure what was chosen and not yet measured, and solve again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

from mpq.flows.run import Calls, Run, announce
from mpq.flows.times import allowed_of, choices, first_times, measured, times_of_plans
from mpq.formats.scheme import of_cache
from mpq.program.anchors import Scale
from mpq.program.constraints import rules_of
from mpq.program.memory import Requests
from mpq.spec import Objective
from mpq.store.entries import TableRef
from mpq.tasks import planning
from mpq.tasks.stage import References, read, read_json, read_together
from mpq.tasks.timing import Wanted

MAKERS = ("mpq", "torch", "transformers", "highspy", "gurobipy")
Scales = Mapping[Objective, list[Scale]]  # one for each limit; of an objective that is not there, 1


def make_plans(
    run: Run, groups: TableRef, sums: References, scales: Scales = MappingProxyType({})
) -> tuple[list[References], list[TableRef]]:
    """Plans for each objective, and the timing tables that those for measured time rest on.

    `scales` are what measured plans say of the predicted KL.
    """
    objectives = list(run.objectives)
    if "et" not in objectives:
        built, without = (make(run, objectives, groups, sums) for make in (gains, gains_without))
        return solve(run, objectives, groups, sums, built, scales, without=without), []
    timed, et = refined(run, groups, sums, scales), objectives.index("et")
    built = gains(run, objectives, groups, sums, timed)
    anchor = anchors_of(run, groups, built[et]["gains"])
    without = gains_without(run, objectives, groups, sums, timed)
    solved = solve(run, objectives, groups, sums, built, scales, timed, anchor, without)
    left = unmeasured_of(run, groups, timed, solved[et])
    if left:
        announce(
            f"{len(left)} configurations of the plans for et are predicted, not measured: "
            f"timing.rounds was {run.spec.timing.rounds}."
        )
    return solved, timed


def refined(run: Run, groups: TableRef, sums: References, scales: Scales) -> list[TableRef]:
    """Timing tables with everything in them that the plans for measured time choose."""
    from mpq.timing.design import refine

    def chosen(timed: list[TableRef]) -> list[Wanted]:
        built = gains(run, ["et"], groups, sums, timed)
        (solved,) = solve(run, ["et"], groups, sums, built, scales, timed)
        wanted = unmeasured_of(run, groups, timed, solved)
        return list(dict.fromkeys([*wanted, *uncertain_of(run, groups, timed)]))

    def measure(timed: list[TableRef], wanted: list[Wanted]) -> list[TableRef]:
        return [*timed, measured(run, groups, wanted, "timing of chosen")]

    timed, _ = refine([first_times(run, groups)], chosen, measure, run.spec.timing.rounds)
    return timed


def unmeasured_of(
    run: Run, groups: TableRef, timed: Sequence[TableRef], solved: References
) -> list[Wanted]:
    """What the program's plans for et put a group in and no timing table has measured."""
    from mpq.timing.design import unmeasured

    plans = [
        p["formats"] for p in read_json(solved["plan_files"]) if p["strategy"].startswith("ip_")
    ]
    return unmeasured(read_together(timed), read(groups), plans, run.spec.model.base)


def uncertain_of(run: Run, groups: TableRef, timed: Sequence[TableRef]) -> list[Wanted]:
    """What is predicted so badly that it should be measured, where the spec asks for it."""
    part = run.spec.timing
    if not (part.more and part.target):
        return []
    found = run.one(
        planning.find_uncertain,
        timing=list(timed),
        choices=choices(run, groups),
        base=run.spec.model.base,
        target=part.target,
        at_most=part.more,
    )
    return [(signature, tuple(of)) for signature, of in read_json(found["uncertain"])]


def anchors_of(run: Run, groups: TableRef, built: TableRef) -> TableRef | None:
    """The measured TTFT of the whole plans that tell how groups help each other."""
    from mpq.timing.design import anchors

    whole = anchors(read(groups), read(built), run.spec.model.base)
    return times_of_plans(run, groups, whole, "TTFT of anchors") if whole else None


def gains(
    run: Run,
    objectives: Sequence[Objective],
    groups: TableRef,
    sums: References,
    timed: Sequence[TableRef] = (),
    leave_out: Sequence[str] = (),
) -> list[References]:
    """The gains table of each objective; `leave_out` names rules that shall not hold."""
    spec = run.spec
    cached = Requests(spec.timing.batch, spec.timing.length + spec.timing.output)
    calls: Calls = {
        objective: {
            "objective": objective,
            "groups": groups,
            "sensitivity": sums["sensitivity"],
            "timing": list(timed) if objective == "et" else [],
            "formats": list(spec.objectives[objective].formats),
            "base": spec.model.base,
            "noise_model": spec.noise_model,
            "bound": spec.timing.bound if objective == "et" else "",
            "allowed": allowed_of(run, groups, objective, leave_out),
            # a key of the gains where they hang on it, and nowhere else
            **({"requests": cached} if of_cache(spec.objectives[objective].formats) else {}),
        }
        for objective in objectives
    }
    return run.map(planning.build_gains, calls)


def gains_without(
    run: Run,
    objectives: Sequence[Objective],
    groups: TableRef,
    sums: References,
    timed: Sequence[TableRef] = (),
) -> list[dict[str, TableRef]]:
    """For each objective, the gains tables in which one rule does not hold, of the rules that rule something out."""
    found: list[dict[str, TableRef]] = [{} for _ in objectives]
    held = {o: allowed_of(run, groups, o) for o in objectives}
    for rule in rules_of(run.spec.constraints, run.spec.engine):
        felt = [o for o in objectives if allowed_of(run, groups, o, [rule.name]) != held[o]]
        built = gains(run, felt, groups, sums, timed, [rule.name]) if felt else []
        for objective, table in zip(felt, built, strict=True):
            found[objectives.index(objective)][rule.name] = table["gains"]
    return found


def solve(
    run: Run,
    objectives: Sequence[Objective],
    groups: TableRef,
    sums: References,
    built: Sequence[References],
    scales: Scales,
    timed: Sequence[TableRef] = (),
    anchor: TableRef | None = None,
    without: Sequence[dict[str, TableRef]] = (),
) -> list[References]:
    """Plans of each objective, for each strategy, τ and seed; `without` prices their rules."""
    spec, provenance = run.spec, {kind: ref.key for kind, ref in sums.items()}
    versions = {name: version(name) for name in MAKERS}
    own = {"stored": run.subject.stored} if run.subject.stored else {}
    calls: dict[str, dict[str, Any]] = {}
    each = zip(objectives, built, without or [{}] * len(objectives), strict=True)
    for objective, found, loosened in each:
        part, et = spec.objectives[objective], objective == "et"
        calls[objective] = {
            "objective": objective,
            "part": part,
            "groups": groups,
            "gains": found["gains"],
            "loss": sums["loss"],
            "sensitivity": sums["sensitivity"],
            "effects": sums["effects"],
            "timing": list(timed) if et else [],
            "limits": list(spec.limits(objective)),
            "base": spec.model.base,
            "solver": spec.solver,
            "fingerprint": run.weights.fingerprint,
            "anchor": anchor if et else None,
            "engine": spec.engine,
            "bounds": spec.constraints.bounds,
            "target": spec.target,
            "without": loosened,
            "scales": scales.get(objective),
            "provenance": {"gains": found["gains"].key, **provenance, **own, "versions": versions},
        }
    solved = run.map(planning.solve, calls)
    return [{**found, "gains": of["gains"]} for found, of in zip(solved, built, strict=True)]
