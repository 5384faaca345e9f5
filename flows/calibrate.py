"""The whole pipeline as one Prefect flow: a checkpoint in, plans and a report out. Wiring only.

Every stage is keyed by the content that it depends on and nothing else (tasks/): a second run computes nothing, a new τ only solves
and evaluates, a new checkpoint of a known architecture re-uses partition and timing.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from prefect.runtime import flow_run

from mpq.flows.checked import checked_plans
from mpq.flows.evaluation import Plans, evaluate
from mpq.flows.exporting import check_caches, check_export, export_plan
from mpq.flows.outputs import publish, write_outputs
from mpq.flows.recorded import flow
from mpq.flows.run import Run, one_by_one, running
from mpq.flows.times import allowed_of
from mpq.program.bounds import check_possible
from mpq.program.plan import stored_in_words
from mpq.redaction import redact
from mpq.spec import BoundsSpec, RunSpec, check_out
from mpq.store.entries import TableRef
from mpq.tasks import calibration, evaluation
from mpq.tasks.stage import References, read, read_json
from mpq.urls import UrlParameter

_LONGEST = 180  # bytes of a run's name, to which watch adds some
Evaluate = Callable[[Run, TableRef, Plans, TableRef], TableRef]


def run_name() -> str:
    """What a run of the flow is called in Prefect: the spec's name, and the model's."""
    given = flow_run.parameters
    return redact(aimed_at(RunSpec.model_validate(given["spec"]), given.get("checkpoint")).title)


@flow(name="calibrate", flow_run_name=run_name, task_runner=one_by_one)
def calibrate(spec: RunSpec, checkpoint: UrlParameter | None = None) -> dict[str, Any]:
    """Calibrate one checkpoint: load, partition, sensitivity, timing, gains, solve, evaluate, report.

    Returns the references of every table, the paths of plans and report, and the stages' accounts.

    Args:
        spec: The run, as in a spec file.
        checkpoint: Hub id, folder or fsspec URL of a checkpoint to calibrate in place of the spec's own.
    """
    with running(aimed_at(spec, checkpoint)) as run:
        return chain(run)


def aimed_at(spec: RunSpec, checkpoint: str | None) -> RunSpec:
    """The spec for another checkpoint of its kind, whose results go to a folder of their own; without one, the spec."""
    if not checkpoint:
        return spec
    name = f"{spec.name}-{checkpoint.rstrip('/').rpartition('/')[2]}"
    # a folder is called by it, whatever others call theirs
    printable = "".join(c if c.isprintable() else "-" for c in name)
    name = printable.encode()[:_LONGEST].decode(errors="ignore")
    model = spec.model.model_copy(update={"path": checkpoint, "revision": None})
    more: dict[str, Any] = {}
    if spec.export and spec.export.out:
        out = f"{spec.export.out.rstrip('/')}/{name}"
        more["export"] = spec.export.model_copy(update={"out": out})
    return spec.model_copy(update={"name": name, "model": model, **more})


def chain(run: Run, evaluate: Evaluate = evaluate, appendix: str = "") -> dict[str, Any]:
    """Every stage in order; returns the tables' references, what was written, and the stages' accounts.

    `appendix` is what the report ends with: `paper`, its figures and Table 1, where a run reproduces them.
    """
    check_out(run.spec)
    found = tables_of(run, evaluate)
    facts = facts_of(run, found.tables["drawn"][0])
    facts |= {"appendix": appendix} if appendix else {}
    drawn = run.one(evaluation.write_report, tables=found.tables, title=run.spec.name, facts=facts)
    plans = [plan for ref in found.plan_files for plan in read_json(ref)]
    out = write_outputs(run.spec, plans, drawn["report"], found.tables, facts)
    publish(run.spec, found.tables, drawn, out)
    if run.spec.export:
        out |= {"checkpoint": export_plan(run, Path(out["plan"]), found.text)}
    return {
        "tables": found.tables,
        "out": out,
        "stages": run.done,
        "architecture": run.architecture.key,
        "fingerprint": run.weights.fingerprint,
        "plan_files": found.plan_files,
    }


class Found(NamedTuple):
    """The tables of a run by kind, each in the parts that stages wrote, the plans as JSON, and the blocks of held-out text."""

    tables: dict[str, list[TableRef]]
    plan_files: list[TableRef]
    text: TableRef


def tables_of(run: Run, evaluate: Evaluate = evaluate) -> Found:
    """The stages up to the evaluation: load → partition → sensitivity → timing, gains, solve → evaluate."""
    check_formats(run)
    loaded = load(run)
    groups = partition(run)
    for objective in run.objectives:  # constraints that no plan keeps are told before the work
        check_possible(read(groups), allowed_of(run, groups, objective), run.spec.constraints)
    check_export(run, groups)
    check_caches(run, groups)
    sums = sensitivity(run, groups, loaded["calibration"])
    solved, timed = checked_plans(run, groups, sums, loaded["check_text"], loaded["drawn"])
    plan_files = [found["plan_files"] for found in solved]
    tables = {
        "groups": [groups],
        "drawn": [loaded["drawn"]],
        "sensitivity": [sums["sensitivity"]],
        "loss": [sums["loss"]],
        "effects": [sums["effects"]],
        "timing": timed,
        "plans": [found["plans"] for found in solved],
        "solutions": [found["solutions"] for found in solved],
        "gains": [found["gains"] for found in solved],
    }
    if run.spec.constrained:
        tables["prices"] = [found["prices"] for found in solved]
    if run.evaluating:
        plans = [plan for ref in plan_files for plan in read_json(ref)]
        tables["evaluation"] = [evaluate(run, groups, plans, loaded["evaluation_text"])]
    return Found(tables, plan_files, loaded["evaluation_text"])


def check_formats(run: Run) -> None:
    """Raise MpqError for a device that is not there or has no kernel for a format, or an engine that has no scheme for one:
    before hours of work, not after."""
    from mpq.kernels import check_native
    from mpq.program import engines

    for part in run.objectives.values():
        engines.check_formats(run.spec.engine, part.formats)

    timed_here = "et" in run.objectives and run.spec.timing.engine == "torch"
    formats = run.objectives["et"].formats if timed_here else ()
    run.place.ask(check_native, formats, run.spec.model.device)


def load(run: Run) -> References:
    """Facts of the model, the blocks of tokens to calibrate and to evaluate on, and which ones were drawn."""
    return run.one(
        calibration.load_model,
        folder=str(run.subject.folder),
        calibration=run.spec.calibration,
        evaluation=run.held_out,
        trusted=run.spec.model.trust_remote_code,
    )


def partition(run: Run) -> TableRef:
    """The groups table."""
    prefill = run.spec.timing
    return run.one(
        calibration.partition,
        architecture=run.architecture,
        batch=prefill.batch,
        length=prefill.length,
    )["groups"]


def sensitivity(run: Run, groups: TableRef, blocks: TableRef) -> References:
    """Sensitivity, loss and effects tables: a task a shard of the calibration blocks, their sum, and the first layer's KL."""
    part = run.spec.calibration
    shards = len(calibration.blocks_of(blocks).shards(part.shards))
    calls = {
        f"shard {shard + 1}/{shards}": {
            "weights": run.weights,
            "groups": groups,
            "blocks": blocks,
            "shard": shard,
            "shards": shards,
            "formats": sorted(run.formats),
            "batch": part.batch,
            "base_term": run.spec.base_term,
            "checkpoint_activations": part.checkpoint_activations,
            "labels": part.labels,
        }
        for shard in range(shards)
    }
    found = run.map(calibration.sensitivity_shard, calls)
    sums = run.one(
        calibration.merge_shards,
        sensitivities=[shard["sensitivity"] for shard in found],
        losses=[shard["loss"] for shard in found],
        effects=[shard["effects"] for shard in found],
    )
    return sums | run.one(
        calibration.first_layer,
        weights=run.weights,
        sensitivity=sums["sensitivity"],
        blocks=blocks,
        batch=part.batch,
    )


def facts_of(run: Run, drawn: TableRef) -> dict[str, str]:
    """What the report tells of a run besides its tables."""
    from mpq.evaluation.sampling import CHECKED_ON, in_words

    spec, words = run.spec, in_words(read(drawn))
    stored = stored_in_words(run.subject.stored)
    bounds = spec.constraints.bounds
    if not any(map(spec.checks_kl, run.objectives)):
        words.pop(CHECKED_ON, None)
    return {
        "model": spec.model.path,
        "fingerprint": run.weights.fingerprint[:16],
        "base": spec.model.base,
        **({"stored quantized": stored} if stored else {}),
        "device": run.architecture.device_name,
        **words,
        "prefill": f"{spec.timing.batch} × {spec.timing.length} tokens",
        **({"answer": f"{spec.timing.output} tokens"} if spec.timing.output > 1 else {}),
        "noise model": spec.noise_model,
        **({} if bounds == BoundsSpec() else {"bounds": bounds.model_dump_json()}),
        "mpq": version("mpq"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
