"""The whole pipeline as one Prefect flow: a checkpoint in, plans and a report out. Wiring only.

Every stage is keyed by the content it depends on and nothing else: a second run computes nothing, a new τ only solves
and evaluates, a new checkpoint of a known architecture re-uses partition and timing.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.outputs import publish, write_outputs
from flows.stages import Call, Stages
from mpq.kernels import Kind
from mpq.spec import EvaluationSpec, Objective, RunSpec
from mpq.store import Store, TableRef, code_version, content_key
from tasks import calibration, evaluation, planning, timing
from tasks.stage import References, read, read_json

KINDS: tuple[Kind, ...] = ("linear", "bgemm")
_EVALUATION = EvaluationSpec(source="the calibration text")


# one worker: a machine's tasks share its device one at a time anyway, and each thread would get an OpenMP team of its own
@flow(name="calibrate", flow_run_name="{spec.name}", task_runner=ThreadPoolTaskRunner(max_workers=1))  # type: ignore[arg-type]
def calibrate(spec: RunSpec) -> dict[str, Any]:
    """Calibrate one checkpoint: load, partition, sensitivity, timing, gains, solve, evaluate, report.

    Returns the references of every table, the paths of plans and report, and the stages' accounts.
    """
    from mpq.kernels import check_native
    from mpq.model import fetch, fingerprint

    if "et" in spec.objectives:  # before hours of work, not after
        check_native(spec.objectives["et"].formats, spec.model.device)
    Store(spec.store).check()
    folder = fetch(spec.model.path, spec.model.revision)
    run = _Run(spec, Stages(spec.store), folder, fingerprint(folder))

    loaded = run.load()
    architecture = read_json(loaded["model"])["architecture"]
    groups = run.partition(architecture)
    sums = run.sensitivity(groups, loaded["calibration"])
    timed = run.timing(groups, architecture) if "et" in spec.objectives else []
    solved, timed = run.plans(groups, sums, timed, architecture)
    plans = [plan for s in solved for plan in read_json(s["plan_files"])]
    evaluated = run.evaluate(groups, plans, loaded["evaluation_text"], architecture)
    tables = {
        "groups": [groups], "sensitivity": [sums["sensitivity"]], "loss": [sums["loss"]], "timing": timed,
        "plans": [s["plans"] for s in solved], "solutions": [s["solutions"] for s in solved], "evaluation": [evaluated],
    }  # fmt: skip
    report, facts = run.report(tables)
    out = write_outputs(spec, plans, report, tables, facts)
    publish(spec, tables, out)
    return {"tables": tables, "out": out, "stages": run.stages.done}


class _Run:
    """One run's stages. Each method computes keys and inputs, and hands tasks to `Stages`."""

    def __init__(self, spec: RunSpec, stages: Stages, folder: Path, fingerprint: str):
        self.spec, self.stages, self.folder = spec, stages, str(folder)
        self.fingerprint = fingerprint
        self.model = {"folder": self.folder, "fingerprint": fingerprint, "base": spec.model.base, "device": spec.model.device}
        self.content = {**self.model, "folder": ""}  # the same for keys: where the checkpoint lies does not matter

    @property
    def device_name(self) -> str:
        from mpq.kernels import device_name

        return device_name(self.spec.model.device)

    def load(self) -> References:
        """Facts of the model, calibration and evaluation blocks; keyed by tokenizer, configuration and texts."""
        from mpq.model import fingerprint_of, source_key

        spec = self.spec
        held_out = spec.evaluation or EvaluationSpec(**spec.calibration.model_dump(exclude={"shards", "checkpoint_activations"}))
        texts = [(t.model_dump(exclude={"source", "batch", "shards"}), source_key(t)) for t in (spec.calibration, held_out)]
        tokenizer = fingerprint_of(Path(self.folder), ("config.json", "tokenizer*", "vocab*", "merges*", "*.model"))
        key = content_key(tokenizer, texts, _code("model"))
        inputs = {"folder": self.folder, "calibration": spec.calibration, "evaluation": held_out}
        return self.stages.run_one("load model", (calibration.load_model, key, f"load {spec.name}", inputs))

    def partition(self, architecture: str) -> TableRef:
        """The groups table; keyed by the architecture, so a fine-tune costs nothing."""
        spec = self.spec
        key = content_key(architecture, spec.timing.batch, spec.timing.length, _code("graph", "partition", "tables"))
        inputs = {"folder": self.folder, "batch": spec.timing.batch, "length": spec.timing.length}
        return self.stages.run_one("partition", (calibration.partition, key, f"partition {spec.name}", inputs))["groups"]

    def sensitivity(self, groups: TableRef, blocks: TableRef) -> References:
        """Sensitivity and loss tables; a task per shard, keyed by weights and the shard's tokens."""
        spec, part = self.spec, self.spec.calibration
        formats, code = sorted(spec.formats), _code("sensitivity", "attention", "quantize", "formats", "model", "tables")
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
        ])  # fmt: skip
        sensitivities, losses = [r["sensitivity"] for r in results], [r["loss"] for r in results]
        key = content_key([r.sha256 for r in (*sensitivities, *losses)], code)
        inputs = {"sensitivities": sensitivities, "losses": losses}
        return self.stages.run_one("merge shards", (calibration.merge_shards, key, f"merge {spec.name}", inputs))

    def timing(self, groups: TableRef, architecture: str) -> list[TableRef]:
        """Timing tables; a task per signature and slice of configurations.

        Keyed by the whole architecture, not by the signature's shapes alone: a row carries the model's own TTFT.
        """
        from mpq.design import design

        part = self.spec.timing
        wanted = [
            (signature, c) for signature, choices in self._choices(groups).items() for c in design(choices, part.limit, part.seed)
        ]
        return self._measured("timing", groups, architecture, wanted)

    def _choices(self, groups: TableRef) -> dict[str, list[tuple[str, ...]]]:
        """For each signature, in the model's order, the formats that its ops may take."""
        from mpq.design import choices_of
        from mpq.kernels import native_formats

        spec = self.spec
        native = {kind: native_formats(spec.model.device, kind) for kind in KINDS}
        formats: dict[str, list[str]] = {k: [f for f in spec.objectives["et"].formats if f in native[k]] for k in KINDS}
        frame = read(groups)
        found: dict[str, list[tuple[str, ...]]] = {}
        for (signature, _), rows in frame.sort("order").group_by(["signature", "group"], maintain_order=True):
            found.setdefault(str(signature), choices_of(rows, formats, spec.model.base))
        return found

    def _measured(
        self, stage: str, groups: TableRef, architecture: str, wanted: Sequence[tuple[str, tuple[str, ...]]]
    ) -> list[TableRef]:
        spec, part = self.spec, self.spec.timing.model_dump(exclude={"slice", "bound", "limit", "rounds"})
        made_with = (
            self.device_name,
            version("torch"),
            version("transformers"),
            _code("timing", "pairs", "apply", "attention", "kernels", "kernels.cpu", "kernels.rows"),
        )
        calls: list[Call] = []
        for signature in dict.fromkeys(s for s, _ in wanted):
            every = [list(c) for s, c in wanted if s == signature]
            for at in range(0, len(every), spec.timing.slice):
                some = every[at : at + spec.timing.slice]
                calls.append((
                    timing.time_configurations,
                    content_key(architecture, signature, some, spec.model.base, part, made_with),
                    f"timing {signature} {at + 1}-{at + len(some)} of {len(every)}",
                    {
                        "folder": self.folder, "base": spec.model.base, "device": spec.model.device, "groups": groups,
                        "signature": signature, "configurations": some, "spec": spec.timing,
                    },
                ))  # fmt: skip
        return [r["timing"] for r in self.stages.run(stage, calls)]

    def plans(
        self, groups: TableRef, sums: References, timed: list[TableRef], architecture: str
    ) -> tuple[list[References], list[TableRef]]:
        """Plans for each objective, and the timing tables that they rest on: for measured time it solves, measures what was
        chosen and not yet measured, and solves again."""
        from mpq.design import fastest, unmeasured

        spec, objectives = self.spec, list(self.spec.objectives)
        for _ in range(spec.timing.rounds if timed else 0):
            gains = self._gains(["et"], groups, sums, timed)
            solved = self._solve(["et"], groups, sums, timed, gains)
            plans = [p["formats"] for p in read_json(solved[0]["plan_files"]) if p["strategy"] == "ip_et"]
            wanted = unmeasured(pl.concat([read(t) for t in timed]), read(groups), plans, spec.model.base)
            if not wanted:
                break
            timed = [*timed, *self._measured("timing of chosen", groups, architecture, wanted)]
        gains = self._gains(objectives, groups, sums, timed)
        anchor = None
        if timed:
            best = fastest(read(groups), read(gains[objectives.index("et")]["gains"]))
            anchor = self._time_plans([best], (spec.evaluation or _EVALUATION).ttft_repeats, architecture, "TTFT of fastest")
        return self._solve(objectives, groups, sums, timed, gains, anchor), timed

    def _gains(
        self, objectives: Sequence[Objective], groups: TableRef, sums: References, timed: list[TableRef]
    ) -> list[References]:
        spec, base = self.spec, self.spec.model.base
        calls: list[Call] = []
        for objective in objectives:
            formats, of = spec.objectives[objective].formats, timed if objective == "et" else []
            choices = self._choices(groups) if objective == "et" else {}
            key = content_key(
                objective, groups.sha256, sums["sensitivity"].sha256, [t.sha256 for t in of], formats, base, spec.noise_model,
                spec.timing.bound, _code("gains", "design", "formats", "tables"),
            )  # fmt: skip
            inputs = {
                "objective": objective, "groups": groups, "sensitivity": sums["sensitivity"], "timing": of, "formats": list(formats),
                "base": base, "noise_model": spec.noise_model, "bound": spec.timing.bound, "choices": choices,
            }  # fmt: skip
            calls.append((planning.build_gains, key, f"gains {objective} {spec.name}", inputs))
        return self.stages.run("gains", calls)

    def _solve(
        self, objectives: Sequence[Objective], groups: TableRef, sums: References, timed: list[TableRef],
        gains: Sequence[References], anchor: TableRef | None = None,
    ) -> list[References]:  # fmt: skip
        spec, base = self.spec, self.spec.model.base
        versions = {name: version(name) for name in ("mpq", "torch", "transformers", "highspy", "gurobipy")}
        keys = {"sensitivity": sums["sensitivity"].key, "loss": sums["loss"].key}
        calls: list[Call] = []
        for objective, built in zip(objectives, gains, strict=True):
            part, of = spec.objectives[objective], timed if objective == "et" else []
            taus, fastest_ttft = list(part.taus or spec.taus), anchor if objective == "et" else None
            key = content_key(
                objective, part, groups.sha256, built["gains"].sha256, sums["loss"].sha256, taus, base, spec.solver, self.fingerprint,
                fastest_ttft and fastest_ttft.sha256, _code("solver", "presolve", "strategies", "design", "plan", "tables"),
            )  # fmt: skip
            inputs = {
                "objective": objective, "part": part, "groups": groups, "gains": built["gains"], "loss": sums["loss"], "timing": of,
                "taus": taus, "base": base, "solver": spec.solver, "fingerprint": self.fingerprint, "anchor": fastest_ttft,
                "provenance": {"gains": built["gains"].key, **keys, "versions": versions},
            }  # fmt: skip
            calls.append((planning.solve, key, f"solve {objective} {spec.name}", inputs))
        return self.stages.run("solve", calls)

    def evaluate(self, groups: TableRef, plans: list[dict[str, Any]], blocks: TableRef, architecture: str) -> TableRef:
        """The evaluation table. Plans with equal formats are evaluated once, whatever strategy or τ made them."""
        from mpq.kernels import runs_natively

        spec, part = self.spec, self.spec.evaluation or _EVALUATION
        code = _code("evaluate", "apply", "attention", "quantize", "kernels.emulated", "model")
        base_losses = self.stages.run_one("evaluate base", (
            evaluation.evaluate_base, content_key(self.content, blocks.sha256, code), f"evaluate base {spec.name}",
            {"model": self.model, "blocks": blocks, "batch": part.batch},
        ))["base_losses"]  # fmt: skip
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
        ])  # fmt: skip
        kinds = dict(read(groups).select("op", "kind").iter_rows())
        where = (kinds, spec.model.base, spec.model.device)
        scores = self._tasks(distinct, names, part) if part.tasks else []
        native = {k: f for k, f in distinct.items() if "et" in spec.objectives and runs_natively(f, *where)}
        ttft = self._time_plans(list(native.values()), part.ttft_repeats, architecture) if native else None
        place, timed_place = ({k: i for i, k in enumerate(keys)} for keys in (distinct, native))
        rows = [
            {**{c: p[c] for c in ("strategy", "objective", "tau", "seed")}, "losses": place[k], "ttft": timed_place.get(k)}
            for p in plans
            for k in [content_key(p["formats"])]
        ]
        refs = [r["plan_losses"] for r in losses]
        return self.stages.run_one("collect", (
            evaluation.collect_evaluation, content_key(rows, [r.sha256 for r in (*refs, *scores)], ttft and ttft.sha256, _code("tables")),
            f"collect {spec.name}", {"plans": rows, "losses": refs, "ttft": ttft, "scores": scores},
        ))["evaluation"]  # fmt: skip

    def _tasks(self, distinct: dict[str, dict[str, str]], names: dict[str, str], part: EvaluationSpec) -> list[TableRef]:
        """Scores of plans on the harness's tasks, in the order of `distinct`; keyed by the datasets' content where they are local."""
        from mpq.task_data import data_key

        what = part.model_dump(include={"tasks", "task_limit", "seeds"})
        code = _code("harness", "task_data", "apply", "attention", "quantize", "kernels.emulated", "model")
        key = (self.content, what, data_key(part.tasks, part.data_dir), version("lm_eval"), code)
        base = self.stages.run_one("tasks base", (
            evaluation.evaluate_base_tasks, content_key("base", *key), f"tasks base {self.spec.name}", {"model": self.model, "spec": part},
        ))["task_scores"]  # fmt: skip
        results = self.stages.run("tasks", [
            (
                evaluation.evaluate_plan_tasks, content_key(formats, *key), f"tasks {names[k]}",
                {"model": self.model, "formats": formats, "spec": part, "base_scores": base, "what": names[k]},
            )
            for k, formats in distinct.items()
        ])  # fmt: skip
        return [r["plan_tasks"] for r in results]

    def _time_plans(self, plans: list[dict[str, str]], repeats: int, architecture: str, stage: str = "TTFT of plans") -> TableRef:
        spec, part = self.spec, self.spec.timing.model_dump(include={"batch", "length", "seed"})
        made_with = (
            self.device_name,
            version("torch"),
            version("transformers"),
            _code("timing", "pairs", "apply", "attention", "kernels", "kernels.cpu", "kernels.rows"),
        )
        inputs = {
            "folder": self.folder, "base": spec.model.base, "device": spec.model.device,
            "plans": plans, "repeats": repeats, "spec": spec.timing,
        }  # fmt: skip
        key = content_key(architecture, plans, spec.model.base, part, repeats, made_with)
        return self.stages.run_one(stage, (timing.time_plans, key, f"{stage} {spec.name}", inputs))["plan_ttft"]

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
            _code("report", "accuracy", "findings", "drawing", "figures", "attention_gain", "paper_figures"),
        )
        inputs = {"tables": tables, "title": spec.name, "facts": facts}
        return self.stages.run_one("report", (evaluation.write_report, key, f"report {spec.name}", inputs))["report"], facts


def _code(*modules: str) -> str:
    return code_version(*(f"mpq.{m}" for m in modules))
