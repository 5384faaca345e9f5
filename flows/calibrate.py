"""The whole pipeline as one Prefect flow: a checkpoint in, plans and a report out. Wiring only.

Every stage is keyed by the content it depends on and nothing else: a second run computes nothing, a new τ only solves
and evaluates, a new checkpoint of a known architecture re-uses partition and timing.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from mpq.evaluation.draw import in_words
from mpq.flows.evaluating import Evaluating
from mpq.flows.outputs import publish, write_outputs
from mpq.flows.place import placed
from mpq.flows.planning import code_of
from mpq.flows.stages import Stages
from mpq.spec import RunSpec
from mpq.store.entries import Store, TableRef, content_key
from mpq.tasks import evaluation
from mpq.tasks.stage import read, read_json


def run_name() -> str:
    """What a run of the flow is called in Prefect: the spec's name, and the model's."""
    given = flow_run.parameters
    return aimed_at(RunSpec.model_validate(given["spec"]), given.get("checkpoint")).title


# one worker: a machine's tasks share its device one at a time anyway, and each thread would get an OpenMP team of its own
@flow(name="calibrate", flow_run_name=run_name, task_runner=ThreadPoolTaskRunner(max_workers=1))  # type: ignore[arg-type]
def calibrate(spec: RunSpec, checkpoint: str | None = None) -> dict[str, Any]:
    """Calibrate one checkpoint: load, partition, sensitivity, timing, gains, solve, evaluate, report.

    Returns the references of every table, the paths of plans and report, and the stages' accounts.

    Args:
        spec: The run, as in a spec file.
        checkpoint: Hub id, folder or fsspec URL of a checkpoint to calibrate in place of the spec's own.
    """
    spec = aimed_at(spec, checkpoint)
    Store(spec.store).check()
    with placed(spec.runner, spec.model.device, "et" in spec.objectives) as place:
        return Pipeline(spec, Stages(spec.store, place, timeout_s=spec.runner.timeout_s)).run()


def aimed_at(spec: RunSpec, checkpoint: str | None) -> RunSpec:
    """The spec for another checkpoint of its kind, whose results go to a folder of their own; without one, the spec."""
    if not checkpoint:
        return spec
    name = f"{spec.name}-{checkpoint.rstrip('/').rpartition('/')[2]}"
    return spec.model_copy(
        update={
            "name": name,
            "model": spec.model.model_copy(update={"path": checkpoint, "revision": None}),
        }
    )


class Pipeline(Evaluating):
    """All stages: plans, their evaluation, and the report."""

    appendix = ""  # what the report ends with: the paper's figures, where a run reproduces them

    def run(self) -> dict[str, Any]:
        """Every stage in order; returns the tables' references, what was written, and the stages' accounts."""
        tables, plan_files, architecture = self.tables()
        report, facts = self.report(tables)
        plans = [plan for ref in plan_files for plan in read_json(ref)]
        out = write_outputs(self.spec, plans, report, tables, facts)
        publish(self.spec, tables, report, out)
        return {
            "tables": tables,
            "out": out,
            "stages": self.stages.done,
            "architecture": architecture,
            "fingerprint": self.fingerprint,
            "plan_files": plan_files,
        }

    def tables(self) -> tuple[dict[str, list[TableRef]], list[TableRef], str]:
        """Every table of the run, the plans as JSON, and the architecture's key."""
        from mpq.kernels import check_native

        formats = self.objectives["et"].formats if "et" in self.objectives else ()
        self.stages.place.ask(
            check_native, formats, self.spec.model.device
        )  # before hours of work, not after
        loaded = self.load()
        architecture = read_json(loaded["model"])["architecture"]
        groups = self.partition(architecture)
        sums = self.sensitivity(groups, loaded["calibration"])
        timed = self.timing(groups, architecture) if "et" in self.objectives else []
        solved, timed = self.plans(groups, sums, timed, architecture)
        plan_files = [s["plan_files"] for s in solved]
        tables = {
            "groups": [groups],
            "drawn": [loaded["drawn"]],
            "sensitivity": [sums["sensitivity"]],
            "loss": [sums["loss"]],
            "timing": timed,
            "plans": [s["plans"] for s in solved],
            "solutions": [s["solutions"] for s in solved],
        }
        if self.evaluating:
            plans = [plan for ref in plan_files for plan in read_json(ref)]
            tables["evaluation"] = [
                self.evaluate(groups, plans, loaded["evaluation_text"], architecture)
            ]
        return tables, plan_files, architecture

    def report(self, tables: dict[str, list[TableRef]]) -> tuple[TableRef, dict[str, str]]:
        """The HTML report and the facts that it tells of the run."""
        spec = self.spec
        facts = {
            "model": spec.model.path,
            "fingerprint": self.fingerprint[:16],
            "base": spec.model.base,
            "device": self.device_name,
            **in_words(read(tables["drawn"][0])),
            "prefill": f"{spec.timing.batch} × {spec.timing.length} tokens",
            "noise model": spec.noise_model,
            "mpq": version("mpq"),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
            **({"appendix": self.appendix} if self.appendix else {}),
        }
        template = (files("mpq.report") / "templates" / "report.html.j2").read_text(
            encoding="utf-8"
        )
        key = content_key(
            [r.sha256 for refs in tables.values() for r in refs],
            facts,
            spec.name,
            template,
            code_of(
                "report.page",
                "report.sheets",
                "report.best",
                "report.summary",
                "report.results",
                "report.accuracy",
                "report.accuracy_figures",
                "report.findings",
                "report.comparisons",
                "report.drawing",
                "report.figures",
                "report.maps",
                "paper.attention_gain",
                "paper.figures",
                "paper.page",
                "paper.table_1",
            ),
        )
        inputs = {"tables": tables, "title": spec.name, "facts": facts}
        return self.stages.run_one(
            "report", (evaluation.write_report, key, f"report {spec.title}", inputs)
        )["report"], facts
