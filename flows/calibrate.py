"""The whole pipeline as one Prefect flow: a checkpoint in, plans and a report out. Wiring only.

Every stage is keyed by the content it depends on and nothing else: a second run computes nothing, a new τ only solves
and evaluates, a new checkpoint of a known architecture re-uses partition and timing.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows.outputs import publish, write_outputs
from flows.place import placed
from flows.stages import Call, Stages
from mpq.spec import EvaluationSpec, RunSpec
from mpq.store import Store, TableRef, code_version, content_key
from tasks import calibration, evaluation, planning, timing
from tasks.checkpoint import source_of
from tasks.stage import References, read, read_json


def run_name() -> str:
    """What a run of a flow is called in Prefect: the spec's name, and the checkpoint where one is given."""
    given = flow_run.parameters
    spec, checkpoint = given["spec"], given.get("checkpoint")
    name = spec["name"] if isinstance(spec, dict) and "name" in spec else getattr(spec, "name", "run")
    return f"{name} {checkpoint.rstrip('/').rpartition('/')[2]}" if checkpoint else name


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
        return Pipeline(spec, Stages(spec.store, place)).run()


def aimed_at(spec: RunSpec, checkpoint: str | None) -> RunSpec:
    """The spec for another checkpoint of its kind, whose results go to a folder of their own; without one, the spec."""
    if not checkpoint:
        return spec
    name = f"{spec.name}-{checkpoint.rstrip('/').rpartition('/')[2]}"
    return spec.model_copy(update={"name": name, "model": spec.model.model_copy(update={"path": checkpoint, "revision": None})})


class Pipeline:
    """One run's stages. Each method computes keys and inputs, and hands tasks to `Stages`.

    `solving` are the objectives to solve for, all of the spec's by default; with `evaluating` off, plans are solved only;
    `measured` are the formats of the sensitivity table, where the spec names fewer.
    """

    def __init__(
        self, spec: RunSpec, stages: Stages, solving: Sequence[str] = (), evaluating: bool = True, measured: Sequence[str] = ()
    ):  # fmt: skip
        from mpq.model import fetch

        self.spec, self.stages, self.evaluating = spec, stages, evaluating
        self.measured = measured or spec.formats
        self.objectives = {k: v for k, v in spec.objectives.items() if not solving or k in solving}
        self.folder = fetch(spec.model.path, spec.model.revision)
        self.source = source_of(spec.model.path, spec.model.revision, self.folder, stages.place.shared)

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
        solved = self.plans(groups, sums, timed)
        plans = [plan for s in solved for plan in read_json(s["plan_files"])]
        tables = {
            "groups": [groups], "sensitivity": [sums["sensitivity"]], "loss": [sums["loss"]], "timing": timed,
            "plans": [s["plans"] for s in solved], "solutions": [s["solutions"] for s in solved],
        }  # fmt: skip
        if self.evaluating:
            tables["evaluation"] = [self.evaluate(groups, plans, loaded["evaluation_text"], architecture)]
        report, facts = self.report(tables)
        out = write_outputs(self.spec, plans, report, tables, facts)
        publish(self.spec, tables, out)
        return {
            "tables": tables, "out": out, "stages": self.stages.done, "architecture": architecture,
            "fingerprint": self.fingerprint, "plan_files": [s["plan_files"] for s in solved],
        }  # fmt: skip

    @cached_property
    def fingerprint(self) -> str:
        """The checkpoint's content."""
        from mpq.model import fingerprint

        return fingerprint(self.folder)

    @property
    def model(self) -> dict[str, str]:
        """What a task needs to load the model."""
        base, device = self.spec.model.base, self.spec.model.device
        return {"folder": self.source, "fingerprint": self.fingerprint, "base": base, "device": device}

    @property
    def content(self) -> dict[str, str]:
        """The model as keys have it: where the checkpoint lies does not matter."""
        return {**self.model, "folder": ""}

    @cached_property
    def device_name(self) -> str:
        """The kind of device that tasks run on."""
        from mpq.kernels import device_name

        return str(self.stages.place.ask(device_name, self.spec.model.device))

    def load(self) -> References:
        """Facts of the model, calibration and evaluation blocks; keyed by tokenizer, configuration and texts."""
        from mpq.model import fingerprint_of, source_key

        spec = self.spec
        held_out = spec.evaluation or EvaluationSpec(**spec.calibration.model_dump(exclude={"shards", "checkpoint_activations"}))
        texts = [(t.model_dump(exclude={"source", "batch", "shards"}), source_key(t)) for t in (spec.calibration, held_out)]
        tokenizer = fingerprint_of(self.folder, ("config.json", "tokenizer*", "vocab*", "merges*", "*.model"))
        key = content_key(tokenizer, texts, _code("model"))
        inputs = {"folder": str(self.folder), "calibration": spec.calibration, "evaluation": held_out}
        return self.stages.run_one("load model", (calibration.load_model, key, f"load {spec.name}", inputs))

    def partition(self, architecture: str) -> TableRef:
        """The groups table; keyed by the architecture, so a fine-tune costs nothing."""
        spec = self.spec
        key = content_key(architecture, spec.timing.batch, spec.timing.length, _code("graph", "partition", "tables"))
        inputs = {"folder": str(self.folder), "batch": spec.timing.batch, "length": spec.timing.length}
        return self.stages.run_one("partition", (calibration.partition, key, f"partition {spec.name}", inputs))["groups"]

    def sensitivity(self, groups: TableRef, blocks: TableRef) -> References:
        """Sensitivity and loss tables; a task per shard, keyed by weights and the shard's tokens."""
        spec, part = self.spec, self.spec.calibration
        formats, code = sorted(self.measured), _code("sensitivity", "attention", "quantize", "formats", "model", "tables")
        shards = calibration.blocks_of(blocks).shards(part.shards)
        results = self.stages.run("sensitivity", [
            (
                calibration.sensitivity_shard,
                content_key(self.content, shard.key, groups.sha256, formats, spec.base_term, code),
                f"sensitivity {spec.name} shard {k + 1}/{len(shards)}",
                {
                    "model": self.model, "groups": groups, "blocks": blocks, "shard": k, "shards": len(shards), "formats": formats,
                    "batch": part.batch, "base_term": spec.base_term, "checkpoint_activations": part.checkpoint_activations,
                },
            )
            for k, shard in enumerate(shards)
        ], "workers")  # fmt: skip
        sensitivities, losses = [r["sensitivity"] for r in results], [r["loss"] for r in results]
        key = content_key([r.sha256 for r in (*sensitivities, *losses)], code)
        inputs = {"sensitivities": sensitivities, "losses": losses}
        return self.stages.run_one("merge shards", (calibration.merge_shards, key, f"merge {spec.name}", inputs))

    def timing(self, groups: TableRef, architecture: str) -> list[TableRef]:
        """Timing tables; a task per signature and slice of configurations.

        Keyed by the whole architecture, not by the signature's shapes alone: a row carries the model's own TTFT.
        """
        from mpq.gains import configurations
        from mpq.kernels import native_formats

        spec, part = self.spec, self.spec.timing.model_dump(exclude={"slice", "bound"})
        formats = {
            k: [f for f in spec.objectives["et"].formats if f in self.stages.place.ask(native_formats, spec.model.device, k)]
            for k in ("linear", "bgemm")
        }
        made_with = (
            self.device_name,
            version("torch"),
            version("transformers"),
            _code("timing", "apply", "attention", "kernels", "kernels.cpu"),
        )
        calls: list[Call] = []
        for (signature,), rows in read(groups).sort("order").group_by(["signature"], maintain_order=True):
            first = rows.filter(rows["group"] == rows["group"].min())
            every = [list(c) for c in configurations(first, formats, spec.model.base)]
            for at in range(0, len(every), spec.timing.slice):
                some = every[at : at + spec.timing.slice]
                calls.append((
                    timing.time_configurations,
                    content_key(architecture, signature, some, spec.model.base, part, made_with),
                    f"timing {signature} {at + 1}-{at + len(some)} of {len(every)}",
                    {
                        "folder": self.source, "base": spec.model.base, "device": spec.model.device, "groups": groups,
                        "signature": signature, "configurations": some, "spec": spec.timing, "made_on": self.device_name,
                    },
                ))  # fmt: skip
        return [r["timing"] for r in self.stages.run("timing", calls, "accelerator")]

    def plans(self, groups: TableRef, sums: References, timed: list[TableRef]) -> list[References]:
        """Gains, then plans, for each objective."""
        spec, base = self.spec, self.spec.model.base
        parts = [(objective, part, timed if objective == "et" else []) for objective, part in self.objectives.items()]
        gains = self.stages.run("gains", [
            (
                planning.build_gains,
                content_key(objective, groups.sha256, sums["sensitivity"].sha256, [t.sha256 for t in of], part.formats, base,
                            spec.noise_model, spec.timing.bound, _code("gains", "formats", "tables")),
                f"gains {objective} {spec.name}",
                {
                    "objective": objective, "groups": groups, "sensitivity": sums["sensitivity"], "timing": of,
                    "formats": list(part.formats), "base": base, "noise_model": spec.noise_model, "bound": spec.timing.bound,
                },
            )
            for objective, part, of in parts
        ])  # fmt: skip
        versions = {name: version(name) for name in ("mpq", "torch", "transformers", "highspy", "gurobipy")}
        keys = {"sensitivity": sums["sensitivity"].key, "loss": sums["loss"].key}
        return self.stages.run("solve", [
            (
                planning.solve,
                content_key(objective, part, groups.sha256, built["gains"].sha256, sums["loss"].sha256, part.taus or spec.taus, base, spec.solver,
                            self.fingerprint, _code("solver", "strategies", "plan", "tables")),
                f"solve {objective} {spec.name}",
                {
                    "objective": objective, "part": part, "groups": groups, "gains": built["gains"], "loss": sums["loss"], "timing": of,
                    "taus": list(part.taus or spec.taus), "base": base, "solver": spec.solver, "fingerprint": self.fingerprint,
                    "provenance": {"gains": built["gains"].key, **keys, "versions": versions},
                },
            )
            for (objective, part, of), built in zip(parts, gains, strict=True)
        ])  # fmt: skip

    def evaluate(self, groups: TableRef, plans: list[dict[str, Any]], blocks: TableRef, architecture: str) -> TableRef:
        """The evaluation table. Plans with equal formats are evaluated once, whatever strategy or τ made them."""
        from mpq.kernels import runs_natively

        spec, part = self.spec, self.spec.evaluation or EvaluationSpec(source="the calibration text")
        code = _code("evaluate", "apply", "attention", "quantize", "kernels.emulated", "model")
        base_losses = self.stages.run_one("evaluate base", (
            evaluation.evaluate_base, content_key(self.content, blocks.sha256, code), f"evaluate base {spec.name}",
            {"model": self.model, "blocks": blocks, "batch": part.batch},
        ), "workers")["base_losses"]  # fmt: skip
        distinct = {content_key(p["formats"]): p["formats"] for p in plans}
        names = {content_key(p["formats"]): f"{p['strategy']} {p['objective']} τ={p['tau']:g}" for p in reversed(plans)}
        losses = self.stages.run("evaluate", [
            (
                evaluation.evaluate_plan, content_key(formats, self.content, blocks.sha256, part.seeds, code), f"evaluate {names[k]}",
                {
                    "model": self.model, "formats": formats, "blocks": blocks, "base_losses": base_losses,
                    "seeds": part.seeds, "batch": part.batch, "what": names[k],
                },
            )
            for k, formats in distinct.items()
        ], "workers")  # fmt: skip
        kinds = dict(read(groups).select("op", "kind").iter_rows())
        where = (kinds, spec.model.base, spec.model.device)
        native = {
            k: f for k, f in distinct.items() if "et" in self.objectives and self.stages.place.ask(runs_natively, f, *where)
        }
        ttft = self._time_plans(list(native.values()), part.ttft_repeats, architecture) if native else None
        place, timed_place = ({k: i for i, k in enumerate(keys)} for keys in (distinct, native))
        rows = [
            {**{c: p[c] for c in ("strategy", "objective", "tau", "seed")}, "losses": place[k], "ttft": timed_place.get(k)}
            for p in plans
            for k in [content_key(p["formats"])]
        ]
        refs = [r["plan_losses"] for r in losses]
        return self.stages.run_one("collect", (
            evaluation.collect_evaluation, content_key(rows, [r.sha256 for r in refs], ttft and ttft.sha256, _code("tables")),
            f"collect {spec.name}", {"plans": rows, "losses": refs, "ttft": ttft},
        ))["evaluation"]  # fmt: skip

    def _time_plans(self, plans: list[dict[str, str]], repeats: int, architecture: str) -> TableRef:
        spec, part = self.spec, self.spec.timing.model_dump(include={"batch", "length", "seed"})
        made_with = (
            self.device_name,
            version("torch"),
            version("transformers"),
            _code("timing", "apply", "attention", "kernels", "kernels.cpu"),
        )
        inputs = {
            "folder": self.source, "base": spec.model.base, "device": spec.model.device,
            "plans": plans, "repeats": repeats, "spec": spec.timing, "made_on": self.device_name,
        }  # fmt: skip
        key = content_key(architecture, plans, spec.model.base, part, repeats, made_with)
        return self.stages.run_one(
            "TTFT of plans", (timing.time_plans, key, f"TTFT of {len(plans)} plans {spec.name}", inputs), "accelerator"
        )["plan_ttft"]

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
            [r.sha256 for refs in tables.values() for r in refs], facts, spec.name, template, _code("report", "figures")
        )
        inputs = {"tables": tables, "title": spec.name, "facts": facts}
        return self.stages.run_one("report", (evaluation.write_report, key, f"report {spec.name}", inputs))["report"], facts


def _code(*modules: str) -> str:
    return code_version(*(f"mpq.{m}" for m in modules))
