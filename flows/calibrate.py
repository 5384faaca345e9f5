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

from flows.outputs import publish, write_outputs
from flows.place import placed
from flows.planning import Planning, code_of
from flows.stages import Stages
from mpq.spec import EvaluationSpec, RunSpec
from mpq.store import Store, TableRef, content_key
from tasks import evaluation
from tasks.stage import read, read_json

# the modules of mpq by which a model runs under an emulated plan
EMULATION = ("apply", "attention", "formats", "quantize", "kernels.emulated", "kernels.rounding", "kernels.compiler")


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
    return spec.model_copy(update={"name": name, "model": spec.model.model_copy(update={"path": checkpoint, "revision": None})})


class Pipeline(Planning):
    """All stages: plans, their evaluation, and the report."""

    def run(self) -> dict[str, Any]:
        """Every stage in order; returns the tables' references, what was written, and the stages' accounts."""
        from mpq.kernels import check_native

        if "et" in self.objectives:  # before hours of work, not after
            self.stages.place.ask(check_native, self.objectives["et"].formats, self.spec.model.device)
        loaded = self.load()
        architecture = read_json(loaded["model"])["architecture"]
        groups = self.partition(architecture)
        sums = self.sensitivity(groups, loaded["calibration"])
        timed = self.timing(groups, architecture) if "et" in self.objectives else []
        solved, timed = self.plans(groups, sums, timed, architecture)
        plans = [plan for s in solved for plan in read_json(s["plan_files"])]
        tables = {
            "groups": [groups], "sensitivity": [sums["sensitivity"]], "loss": [sums["loss"]], "timing": timed,
            "plans": [s["plans"] for s in solved], "solutions": [s["solutions"] for s in solved],
        }  # fmt: skip
        if self.evaluating:
            tables["evaluation"] = [self.evaluate(groups, plans, loaded["evaluation_text"], architecture)]
        report, facts = self.report(tables)
        out = write_outputs(self.spec, plans, report, tables, facts)
        publish(self.spec, tables, report, out)
        return {
            "tables": tables, "out": out, "stages": self.stages.done, "architecture": architecture,
            "fingerprint": self.fingerprint, "plan_files": [s["plan_files"] for s in solved],
        }  # fmt: skip

    def evaluate(self, groups: TableRef, plans: list[dict[str, Any]], blocks: TableRef, architecture: str) -> TableRef:
        """The evaluation table. Plans with equal formats are evaluated once, whatever strategy or τ made them."""
        from mpq.kernels import runs_natively

        spec, part = self.spec, self.held_out
        code = code_of("evaluate", *EMULATION, "model")
        base_losses = self.stages.run_one("evaluate base", (
            evaluation.evaluate_base, content_key(self.content, blocks.sha256, code), f"evaluate base {spec.title}",
            {"model": self.model, "blocks": blocks, "batch": part.batch},
        ), "workers")["base_losses"]  # fmt: skip
        distinct = {content_key(p["formats"]): p["formats"] for p in plans}
        names = {content_key(p["formats"]): f"{p['strategy']} {p['objective']} τ={p['tau']:g}" for p in reversed(plans)}
        losses = self.stages.run("evaluate", [
            (
                evaluation.evaluate_plan, content_key(formats, self.content, blocks.sha256, part.seeds, code), f"evaluate {spec.title} {names[k]}",
                {
                    "model": self.model, "formats": formats, "blocks": blocks, "base_losses": base_losses,
                    "seeds": part.seeds, "batch": part.batch, "what": names[k],
                },
            )
            for k, formats in distinct.items()
        ], "workers")  # fmt: skip
        kinds = dict(read(groups).select("op", "kind").iter_rows())
        where = (kinds, spec.model.base, spec.model.device)
        scores = self._tasks(distinct, names, part) if part.tasks else []
        native = {
            k: f for k, f in distinct.items() if "et" in self.objectives and self.stages.place.ask(runs_natively, f, *where)
        }
        ttft = self.time_plans(groups, list(native.values()), part.ttft_repeats, architecture) if native else None
        place, timed_place = ({k: i for i, k in enumerate(keys)} for keys in (distinct, native))
        rows = [
            {**{c: p[c] for c in ("strategy", "objective", "tau", "seed")}, "losses": place[k], "ttft": timed_place.get(k)}
            for p in plans
            for k in [content_key(p["formats"])]
        ]
        refs = [r["plan_losses"] for r in losses]
        return self.stages.run_one("collect", (
            evaluation.collect_evaluation, content_key(rows, [r.sha256 for r in (*refs, *scores)], ttft and ttft.sha256, code_of("tables")),
            f"collect {spec.title}", {"plans": rows, "losses": refs, "ttft": ttft, "scores": scores},
        ))["evaluation"]  # fmt: skip

    def _tasks(self, distinct: dict[str, dict[str, str]], names: dict[str, str], part: EvaluationSpec) -> list[TableRef]:
        """Scores of plans on the harness's tasks, in the order of `distinct`; keyed by the datasets' content where they are local."""
        from mpq.task_data import data_key, harness_version

        what = part.model_dump(include={"tasks", "task_limit", "seeds"})
        code = code_of("harness", "task_data", *EMULATION, "model")
        key = (self.content, what, data_key(part.tasks, part.data_dir), harness_version(), code)
        base = self.stages.run_one("tasks base", (
            evaluation.evaluate_base_tasks, content_key("base", *key), f"tasks base {self.spec.title}", {"model": self.model, "spec": part},
        ), "workers")["task_scores"]  # fmt: skip
        results = self.stages.run("tasks", [
            (
                evaluation.evaluate_plan_tasks, content_key(formats, *key), f"tasks {self.spec.title} {names[k]}",
                {"model": self.model, "formats": formats, "spec": part, "base_scores": base, "what": names[k]},
            )
            for k, formats in distinct.items()
        ], "workers")  # fmt: skip
        return [r["plan_tasks"] for r in results]

    def report(self, tables: dict[str, list[TableRef]]) -> tuple[TableRef, dict[str, str]]:
        """The HTML report and the facts that it tells of the run."""
        spec = self.spec
        facts = {
            "model": spec.model.path, "fingerprint": self.fingerprint[:16], "base": spec.model.base, "device": self.device_name,
            "prefill": f"{spec.timing.batch} × {spec.timing.length} tokens", "noise model": spec.noise_model,
            "mpq": version("mpq"), "torch": version("torch"), "transformers": version("transformers"), "python": platform.python_version(),
        }  # fmt: skip
        template = (files("mpq") / "templates" / "report.html.j2").read_text(encoding="utf-8")
        key = content_key(
            [r.sha256 for refs in tables.values() for r in refs],
            facts,
            spec.name,
            template,
            code_of("report", "accuracy", "findings", "drawing", "figures", "attention_gain", "paper_figures"),
        )
        inputs = {"tables": tables, "title": spec.name, "facts": facts}
        return self.stages.run_one("report", (evaluation.write_report, key, f"report {spec.title}", inputs))["report"], facts
