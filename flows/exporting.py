"""The end of a run that is to be served: the plan to run, as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mpq.errors import MpqError
from mpq.flows.run import Run, announce
from mpq.flows.times import allowed_of
from mpq.program.plan import Plan, plan_name
from mpq.spec import Objective
from mpq.store.entries import TableRef
from mpq.tasks import exporting

_OWN = "checkpoint"  # in the run's own folder


def out_of(run: Run) -> str:
    """The folder or URL that the checkpoint is written to."""
    spec = run.spec
    assert spec.export
    return spec.export.out or str(Path(spec.out) / spec.name / _OWN)


def check_export(run: Run, groups: TableRef) -> None:
    """Raise MpqError for what would keep the run from ending with a checkpoint, before anything slow.

    These are a folder that is not to be replaced, a plan that the run does not make, and what its plans may choose and the
    file or the engine cannot express.
    """
    from mpq.export import Elsewhere, check_exportable, is_elsewhere, local_path
    from mpq.export.folder import Asked, check_target

    part = run.spec.export
    if not part:
        return
    objective = _objective(run)
    out, ours = out_of(run), part.out is None or part.overwrite
    asked, of = Asked("export.out", "export.overwrite: true"), run.weights.fingerprint
    if is_elsewhere(out):  # what is there already may be the very one
        there = Elsewhere(out).record().get("fingerprint") == of
        Elsewhere(out).check_target(ours or there, asked)
    else:
        there = _fingerprint(local_path(out)) == of
        check_target(local_path(out), run.subject.folder, ours or there, asked)
    if part.to == "json":
        return
    model, allowed = run.spec.model, allowed_of(run, groups, objective).formats
    for formats in _extremes(allowed, part.to):
        check_exportable(
            formats,
            model.base,
            run.subject.folder,
            run.spec.engine,
            model.trust_remote_code,
            part.to,
        )


def _extremes(allowed: Mapping[str, Sequence[str]], to: str) -> Iterator[dict[str, str]]:
    """Plans that have all that each op may take but base, one after the other."""
    for place in range(1, max(map(len, allowed.values()), default=0)):
        yield {op: may[min(place, len(may) - 1)] for op, may in allowed.items()}
    if to == "mxfp4":  # it holds all layers' experts or none: may they be those of one layer alone?
        first = next((op for op in allowed if ".experts." in op), "").rpartition(".")[0]
        yield {op: may[-1 if op.startswith(first) else 0] for op, may in allowed.items()}


def check_caches(run: Run, groups: TableRef) -> None:
    """Tell of caches that plans may lower and that no export can have, before anything slow.

    Raises MpqError for them where the plans are an engine's, which could not serve them.
    """
    from mpq import export
    from mpq.formats.scheme import of_cache

    if "m" not in run.objectives or not of_cache(run.objectives["m"].formats):
        return
    may = allowed_of(run, groups, "m").formats
    lowered = {op: f for op, of in may.items() for f in of_cache(of)}
    try:
        export.check_caches(lowered, run.subject.folder, run.spec.model.trust_remote_code)
    except MpqError as error:
        if run.spec.engine != "none":
            raise
        announce(f"Plans with lowered caches run in mpq only. {error}")


def export_plan(run: Run, file: Path, text: TableRef) -> str:
    """Export the plan that the spec names, or the one in `file`; returns where the checkpoint is.

    Raises MpqError where the named plan was not made, since under its τ there is none.
    """
    spec, part = run.spec, run.spec.export
    assert part
    if part.plan:
        file = file.with_name(f"{part.plan}.json")
    if not file.is_file():
        raise MpqError(
            f"export.plan: the run made no plan {file.stem}: under its τ none keeps the bounds; choose another."
        )
    plan = Plan.from_json(file.read_text(encoding="utf-8"))
    out = out_of(run)
    run.one(
        exporting.export_plan,
        weights=replace(run.weights, device="cpu") if run.place.shared else run.weights,
        source=str(run.subject.folder),
        plan=json.loads(json.dumps(asdict(replace(plan, provenance={})))),
        provenance=plan.provenance,
        to=part.to,
        engine=spec.engine,
        text=text,
        out=out,
        overwrite=part.overwrite or part.out is None,
        trusted=spec.model.trust_remote_code,
    )
    return out


def _objective(run: Run) -> Objective:
    """The objective of the plan to be exported. Raises MpqError for a plan that the spec does not ask for."""
    part = run.spec.export
    assert part
    if not part.plan:  # as report.best chooses
        return next(o for o in ("et", "tt", "m") if o in run.objectives)
    made = {name: objective for objective in run.objectives for name in _names(run, objective)}
    if part.plan not in made:
        raise MpqError(
            f"export.plan: the run makes no plan {part.plan}: expected one such as {next(iter(made))}."
        )
    return made[part.plan]


def _names(run: Run, objective: Objective) -> list[str]:
    spec, part = run.spec, run.objectives[objective]
    names = []
    for strategy in part.strategies:
        if strategy == "uniform":
            uniform = [f"uniform_{f}{left}" for f in part.formats for left in ("", "_but_head")]
            names += [plan_name(objective, strategy, 0.0) for strategy in uniform]
            continue
        name = f"ip_{objective}" if strategy == "ip" else strategy
        for seed in range(part.random_seeds if strategy == "random" else 1):
            for limit in spec.limits(objective):
                kl = limit.kl if limit.tau is None else None
                names.append(plan_name(objective, name, limit.tau or 0.0, seed, kl))
    return [*names, *([plan_name(objective, "ip_loss", 0.0)] if spec.target else [])]


def _fingerprint(out: Path) -> str | None:
    """Of which weights an export in `out` is, None where there is none."""
    try:
        found = json.loads((out / "export.json").read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return str(found)
