"""The paper's evaluation: every strategy, τ, seed and task of a spec, with the cost told first, and all figures and Table 1."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from mpq.flows.calibrate import Pipeline
from mpq.flows.evaluating import EMULATION, Plans
from mpq.flows.forecast import Look, Work, forecast, told
from mpq.flows.place import placed
from mpq.flows.planning import code_of
from mpq.flows.stages import Stages, tell
from mpq.report.runs import join_tables
from mpq.spec import RunSpec
from mpq.store.entries import Damaged, Store, TableRef, content_key
from mpq.tasks import calibration, evaluation
from mpq.tasks.stage import read, read_json

DryRun = Annotated[
    bool, Field(description="Say what would be computed and how long it takes, and stop")
]


@flow(
    name="reproduce",
    flow_run_name="reproduce {spec.name}",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]
)
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

    Store(spec.store).check()
    with placed(spec.runner, spec.model.device, "et" in spec.objectives) as place:
        sweep = Sweep(spec, Stages(spec.store, place, timeout_s=spec.runner.timeout_s))
        works = sweep.foretold(sweep.tables)
        rows = [asdict(work) for work in works]
        create_table_artifact(
            rows, key="forecast", description=f"What is left to compute: {spec.name}"
        )
        if dry_run:
            return {"forecast": rows}
        outcome = sweep.run()
    folder = Path(outcome["out"]["report"]).parent / "figures"
    left_out = write_figures(join_tables(outcome["tables"]), folder, spec.model.base)
    for sentence in left_out:
        tell(sentence)
    outcome["out"] |= {"figures": str(folder)}
    return {**outcome, "forecast": rows, "left_out": left_out}


class Sweep(Pipeline):
    """The pipeline with its cost told on the way, and the paper's figures in its report."""

    appendix = "paper"
    _whole = False  # whether a look has come to the end, so that there is nothing new to tell

    def evaluate(
        self, groups: TableRef, plans: Plans, blocks: TableRef, architecture: str
    ) -> TableRef:
        """As everywhere; the plans are known by now, so how many evaluations there are is too."""
        if not isinstance(self.stages, Look) and not self._whole:
            self.foretold(lambda: Pipeline.evaluate(self, groups, plans, blocks, architecture))
        return super().evaluate(groups, plans, blocks, architecture)

    def foretold(self, what: Callable[[], object]) -> list[Work]:
        """Go through stages without computing them, and tell what is left to do."""
        look, mine = Look(self.spec.store, self.stages.place), self.stages
        self.stages = look
        try:
            with suppress(Damaged):  # what follows depends on what is not there yet
                what()
                self._whole = True
            works = self._forecast(look)
        finally:
            self.stages = mine
        tell(told(works, self.spec, self.held_out))
        return works

    def _forecast(self, look: Look) -> list[Work]:
        loaded = self.load()
        facts = read_json(loaded["model"])
        texts = {
            part: calibration.blocks_of(loaded[kind]).tokens.size
            for part, kind in (("calibration", "calibration"), ("evaluation", "evaluation_text"))
        }
        everything_stored = self._whole and all(stored for _, _, stored in look.asked)
        pace = {"base_s_per_token": 0.0, "lowered_s_per_token": 0.0}
        if not everything_stored:
            pace = read(self._pace(facts["architecture"])).row(0, named=True)
        return forecast(
            look.asked, self.spec, self.held_out, {**texts, **facts["request_tokens"]}, pace
        )

    def _pace(self, architecture: str) -> TableRef:
        """Seconds per token; keyed by the kind of device and the hour, since what else a machine does changes."""
        part, lowered = self.held_out, self.spec.formats[-1]
        groups = self.partition(architecture)
        formats = {op: lowered for op, _ in calibration.measured_ops(groups)}
        key = content_key(
            architecture,
            self.device_name,
            self.spec.model.base,
            lowered,
            part.batch,
            part.length,
            int(time.time() // 3600),
            code_of("evaluation.pace", *EMULATION),
        )
        inputs = {
            "model": self.model,
            "formats": formats,
            "batch": part.batch,
            "length": part.length,
        }
        return self.stages.run_one(
            "pace", (evaluation.measure_pace, key, f"pace {self.spec.name}", inputs), "workers"
        )["pace"]
