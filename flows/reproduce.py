"""The paper's evaluation: every strategy, τ, seed and task of a spec, with the cost told first, and all figures and Table 1."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from prefect.artifacts import create_table_artifact
from pydantic import Field

from mpq.flows.calibrate import chain, load, partition, tables_of
from mpq.flows.evaluation import Plans, evaluate
from mpq.flows.recorded import flow
from mpq.flows.run import Account, Calls, Run, announce, one_by_one, running
from mpq.paper.forecast import Asked, Work, forecast, forecast_in_words
from mpq.report.runs import join_tables
from mpq.spec import RunSpec
from mpq.store.entries import Damaged, Store, TableRef
from mpq.tasks import calibration, evaluation
from mpq.tasks.stage import References, Stage, read, read_json

DryRun = Annotated[
    bool, Field(description="Say what would be computed and how long it takes, and stop")
]
# seconds each, and the counts of what follows rest on them: a look computes these
LOOKED_AT = frozenset({"load model", "partition", "pace"})


@flow(name="reproduce", flow_run_name="reproduce {spec.name}", task_runner=one_by_one)
def reproduce(spec: RunSpec, dry_run: DryRun = False) -> dict[str, Any]:
    """Run the whole sweep of a spec, what is stored re-used; write report, figures 1 to 9 (SVG, PNG) and Table 1.

    Before anything long, and again once the plans are known, it tells how many evaluations there are, how many of them
    are cached, and about how long the others take. Returns what calibrate does, the forecast, where the figures are, and
    which were left out and why; with `dry_run` the forecast alone.

    Args:
        spec: The sweep: model, calibration, objectives with their τ and draws, evaluation with its seeds and tasks.
        dry_run: Say what would be computed and how long it takes, and stop.
    """
    from mpq.paper.figures import write_figures

    with running(spec) as run:
        whole, works = foretell(run, tables_of)

        def evaluate_and_tell(
            run: Run, groups: TableRef, plans: Plans, blocks: TableRef
        ) -> TableRef:
            """As everywhere; the plans are known by now, so how many evaluations there are is too."""
            if not whole:
                foretell(run, lambda look: evaluate(look, groups, plans, blocks))
            return evaluate(run, groups, plans, blocks)

        rows = [asdict(work) for work in works]
        create_table_artifact(
            rows, key="forecast", description=f"What is left to compute: {spec.name}"
        )
        if dry_run:
            return {"forecast": rows}
        outcome = chain(run, evaluate_and_tell, appendix="paper")
    folder = Path(outcome["out"]["report"]).parent / "figures"
    left_out = write_figures(join_tables(outcome["tables"]), folder, spec.model.base)
    for sentence in left_out:
        announce(sentence)
    outcome["out"] |= {"figures": str(folder)}
    return {**outcome, "forecast": rows, "left_out": left_out}


@dataclass
class Look(Run):
    """A run that looks instead of computing: what is stored comes back, what is not is noted.

    A reference to what is not there raises Damaged when it is read, which is where a look ends.
    """

    asked: list[Asked] = field(default_factory=list)

    def map(self, stage: Stage, calls: Calls, name: str = "") -> list[References]:
        """References to what is stored, and placeholders for the rest."""
        name = name or stage.name
        if name in LOOKED_AT:
            return super().map(stage, calls, name)
        store, out = Store(self.spec.store), []
        for inputs in calls.values():
            key = stage.key(dict(inputs))
            found = {kind: store.find(kind, key) for kind in stage.kinds}
            self.asked.append((name, inputs, all(found.values())))
            absent = {kind: TableRef(kind, key, "", 0, 0, store=store.url) for kind in stage.kinds}
            out.append({kind: found[kind] or absent[kind] for kind in stage.kinds})
        return out

    def _account(self, name: str, tasks: int, cached: int, start: float) -> None:
        """Looking is no work done."""


def foretell(run: Run, what: Callable[[Run], object]) -> tuple[bool, list[Work]]:
    """Go through stages without computing them, and tell what is left to do: whether it came to their end, and the work."""
    done: list[Account] = []
    look = Look(run.subject, run.objectives, run.formats, run.evaluating, run.only, done=done)
    whole = False
    with suppress(Damaged):  # what follows depends on what is not there yet
        what(look)
        whole = True
    works = _forecast(look, whole)
    announce(forecast_in_words(works, run.spec, run.held_out))
    return whole, works


def _forecast(look: Look, whole: bool) -> list[Work]:
    loaded = load(look)
    facts = read_json(loaded["model"])
    parts = (("calibration", "calibration"), ("evaluation", "evaluation_text"))
    texts = {part: calibration.blocks_of(loaded[kind]).tokens.size for part, kind in parts}
    pace = {"base_s_per_token": 0.0, "lowered_s_per_token": 0.0}
    if not (whole and all(stored for _, _, stored in look.asked)):
        pace = read(_pace(look)).row(0, named=True)
    tokens = {**texts, **facts["request_tokens"]}
    return forecast(look.asked, look.spec, look.held_out, tokens, pace)


def _pace(look: Look) -> TableRef:
    """Seconds per token on this kind of device, in this hour."""
    part, lowered = look.held_out, look.spec.formats[-1]
    formats = {op: lowered for op, _ in calibration.measured_ops(partition(look))}
    return look.one(
        evaluation.measure_pace,
        weights=look.weights,
        formats=formats,
        batch=part.batch,
        length=part.length,
        at=(look.architecture.device_name, int(time.time() // 3600)),
    )["pace"]
