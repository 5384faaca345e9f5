"""Measured time: which configurations and plans are timed, as tasks of a size that fits the devices at hand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from prefect.runtime import flow_run

from mpq.flows.run import Calls, Run
from mpq.program.constraints import Allowed, allowed, options_by_signature
from mpq.program.engines import KINDS
from mpq.spec import Objective
from mpq.store.entries import Store, TableRef
from mpq.tasks import timing
from mpq.tasks.stage import read, read_json
from mpq.tasks.timing import Wanted
from mpq.timing.options import Options
from mpq.timing.slices import TaskCost, seconds_of, slice_size


def allowed_of(
    run: Run, groups: TableRef, objective: Objective, leave_out: Sequence[str] = ()
) -> Allowed:
    """What the plans of an objective may choose: the engine's rules and the spec's, over the formats that it lowers to.

    For measured time these are the device's own; for memory, BGEMMs are decided by what their cache is stored in, or not at all.
    `leave_out` names rules that shall not hold. Raises MpqError for constraints that no plan keeps.
    """
    from mpq.formats.scheme import of_cache, of_kind
    from mpq.kernels import native_formats
    from mpq.serving.schemes import formats_in_vllm

    spec = run.spec
    lowered = spec.objectives[objective].formats
    formats = {str(kind): of_kind(kind, lowered) for kind in KINDS}
    for kind in KINDS if objective == "et" else ():
        if spec.timing.engine == "vllm":
            native = formats_in_vllm(kind, spec.model.device)
        else:
            native = run.place.ask(native_formats, spec.model.device, kind)
        formats[kind] = tuple(f for f in lowered if f in native)
    if objective == "m":
        caches = of_cache(formats.pop("bgemm"))
        formats |= {"bgemm": caches} if caches else {}
    return allowed(read(groups), spec.constraints, spec.engine, formats, spec.model.base, leave_out)


def choices(run: Run, groups: TableRef) -> dict[str, list[Options]]:
    """For each signature, in the model's order, what its groups may take."""
    return options_by_signature(read(groups), allowed_of(run, groups, "et"))


def first_times(run: Run, groups: TableRef) -> TableRef:
    """The timing table of the configurations to begin with."""
    from mpq.timing.design import design

    part = run.spec.timing
    wanted = [
        (signature, configuration)
        for signature, of_ops in choices(run, groups).items()
        for configuration in design(of_ops, part.limit, part.seed)
    ]
    return measured(run, groups, wanted, "timing")


def measured(run: Run, groups: TableRef, wanted: Sequence[Wanted], name: str) -> TableRef:
    """One timing table of everything wanted; what the store has not is measured, an entry a configuration."""
    keys = timing.measurement_keys(run.architecture, groups, list(wanted), run.spec.timing)
    store, found = Store(run.spec.store), dict[str, TableRef]()
    if not store.find("timing", timing.merge_measurements.key({"keys": list(keys)})):
        found = store.find_all("measurement", keys)
        if missing := {key: what for key, what in keys.items() if key not in found}:
            slices = _slices(run, groups, missing)
            for part in run.map(timing.time_configurations, slices, f"{name}: measure"):
                found |= part
    return run.one(
        timing.merge_measurements,
        name,
        keys=list(keys),
        measurements=[found[key] for key in keys if key in found],
        groups=groups,
    )["timing"]


def _slices(run: Run, groups: TableRef, missing: dict[str, Wanted]) -> Calls:
    """Tasks for what is to be measured, some configurations of one signature each.

    In an order of this flow run's own: of two runs at once, each finds done what the other began with.
    """
    size = run.spec.timing.slice or _slice(run, len(missing))
    calls = {}
    for signature in dict.fromkeys(s for s, _ in missing.values()):
        every = [key for key, (s, _) in missing.items() if s == signature]
        for at in range(0, len(every), size):
            some = {key: missing[key] for key in every[at : at + size]}
            calls[f"{signature} {at + 1}-{at + len(some)} of {len(every)}"] = {
                "architecture": run.architecture,
                "groups": groups,
                "wanted": some,
                "spec": run.spec.timing,
            }
    order = list(calls)
    random.Random(str(flow_run.id)).shuffle(order)
    return {detail: calls[detail] for detail in order}


def _slice(run: Run, configurations: int) -> int:
    """Configurations per task, from how many there are, how many accelerators, and what a task costs on one."""
    place, part = run.place, run.spec.timing
    if place.accelerators <= 1:
        return configurations
    if part.engine != "torch":
        # importing an engine takes longer than most measure; but where each configuration begins an engine of its own, that is
        # most of the time, and no device shall wait for it
        return math.ceil(configurations / place.accelerators) if part.compile else configurations
    found = run.one(timing.probe, architecture=run.architecture, spec=part)["probe"]
    told = read_json(found)
    seconds = seconds_of(part.repeats, told["ttft_s"])
    cost = TaskCost(build_s=told["build_s"], configuration_s=seconds)
    return slice_size(configurations, place.accelerators, cost)


def times_of_plans(
    run: Run, groups: TableRef, plans: Sequence[dict[str, str]], purpose: str
) -> TableRef:
    """TTFT of whole plans (op → format), base interleaved, a row a plan."""
    return run.one(
        timing.time_plans,
        purpose,
        architecture=run.architecture,
        groups=groups,
        plans=list(plans),
        repeats=run.held_out.ttft_repeats,
        spec=run.spec.timing,
        purpose=purpose,
    )["plan_ttft"]
