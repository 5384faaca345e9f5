"""The stages from a checkpoint to plans. Each method computes keys and inputs, and hands tasks to `Stages`. Wiring only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING

import polars as pl
from prefect.runtime import flow_run

from mpq.flows.stages import Call, Stages, tell
from mpq.kernels import Kind
from mpq.spec import FROM_TASKS, EvaluationSpec, Objective, RunSpec
from mpq.store.entries import Store, TableRef, code_version, content_key
from mpq.tasks import calibration, planning, timing
from mpq.tasks.checkpoint import source_of
from mpq.tasks.stage import References, read, read_json
from mpq.timing.slices import TaskCost, seconds_of, slice_size

if TYPE_CHECKING:
    from mpq.timing.design import Wanted

KINDS: tuple[Kind, ...] = ("linear", "bgemm")
# the modules of mpq that a measured time depends on; kernels.cpu is CUDA's too: its linears in 16 bits
TIMING = (
    "timing.measure",
    "running.prefill",
    "timing.pairs",
    "timing.machine",
    "running.apply",
    "models.attention",
    "models.partition",
    "kernels",
    "kernels.cpu",
)
CPU_KERNELS = ("kernels.compiler", "kernels.rows", "kernels.int8_attention", "kernels.int8_linear")
CUDA_KERNELS = ("kernels.cuda", "kernels.fp8", "kernels.flash", "kernels.bgemm")


class Planning:
    """One run's stages. Each method computes keys and inputs, and hands tasks to `Stages`.

    `solving` are the objectives to solve for, all of the spec's by default; with `evaluating` off, plans are solved only;
    `measured` are the formats of the sensitivity table, where the spec names fewer.
    """

    def __init__(
        self,
        spec: RunSpec,
        stages: Stages,
        solving: Sequence[str] = (),
        evaluating: bool = True,
        measured: Sequence[str] = (),
    ):
        from mpq.models.checkpoint import fetch

        self.spec, self.stages, self.evaluating = spec, stages, evaluating
        self.measured = measured or spec.formats
        self.objectives = {k: v for k, v in spec.objectives.items() if not solving or k in solving}
        self.folder = fetch(spec.model.path, spec.model.revision)
        self.source = source_of(
            spec.model.path, spec.model.revision, self.folder, stages.place.shared
        )

    @property
    def held_out(self) -> EvaluationSpec:
        """How plans are evaluated; on the calibration text where the spec does not say."""
        part = self.spec.calibration.model_dump(
            exclude={"shards", "share", "checkpoint_activations"}
        )
        return self.spec.evaluation or EvaluationSpec(**part)

    @cached_property
    def fingerprint(self) -> str:
        """The checkpoint's content."""
        from mpq.models.checkpoint import fingerprint

        return fingerprint(self.folder)

    @property
    def model(self) -> dict[str, str]:
        """What a task needs to load the model."""
        base, device = self.spec.model.base, self.spec.model.device
        return {
            "folder": self.source,
            "fingerprint": self.fingerprint,
            "base": base,
            "device": device,
        }

    @property
    def content(self) -> dict[str, str]:
        """The model as keys have it: where the checkpoint lies does not matter."""
        return {**self.model, "folder": ""}

    @cached_property
    def device_name(self) -> str:
        """The kind of device that tasks run on."""
        from mpq.kernels import device_name

        return str(self.stages.place.ask(device_name, self.spec.model.device))

    @cached_property
    def _made_with(self) -> tuple[str, ...]:
        """What a time depends on besides the model: device, libraries, kernels."""
        code = code_of(*TIMING, *(CPU_KERNELS if self.spec.model.device == "cpu" else CUDA_KERNELS))
        return self.device_name, version("torch"), version("transformers"), code

    def load(self) -> References:
        """Facts of the model, calibration and evaluation blocks; keyed by tokenizer, configuration, texts and tasks."""
        from mpq.evaluation.task_data import data_key, harness_version
        from mpq.models.checkpoint import fingerprint_of
        from mpq.models.text import TOKENIZER_FILES, source_key

        spec, held_out = self.spec, self.held_out
        elsewhere = {
            "source",
            "data_dir",
            "batch",
            "shards",
            "checkpoint_activations",
            "seeds",
            "ttft_repeats",
        }
        texts = [
            (t.model_dump(exclude=elsewhere), t.source == FROM_TASKS or source_key(t))
            for t in (spec.calibration, held_out)
        ]
        tasks = (
            (data_key(held_out.tasks, held_out.data_dir), harness_version())
            if held_out.tasks
            else None
        )
        tokenizer = fingerprint_of(self.folder, TOKENIZER_FILES)
        key = content_key(
            tokenizer,
            texts,
            tasks,
            code_of(
                "models.checkpoint",
                "models.text",
                "models.documents",
                "evaluation.draw",
                "evaluation.task_data",
                "store.tables",
            ),
        )
        inputs = {
            "folder": str(self.folder),
            "calibration": spec.calibration,
            "evaluation": held_out,
        }
        return self.stages.run_one(
            "load model", (calibration.load_model, key, f"load {spec.title}", inputs)
        )

    def partition(self, architecture: str) -> TableRef:
        """The groups table; keyed by the architecture, so a fine-tune costs nothing."""
        spec = self.spec
        key = content_key(
            architecture,
            spec.timing.batch,
            spec.timing.length,
            code_of("models.graph", "models.linears", "models.partition", "store.tables"),
        )
        inputs = {
            "folder": str(self.folder),
            "batch": spec.timing.batch,
            "length": spec.timing.length,
        }
        return self.stages.run_one(
            "partition", (calibration.partition, key, f"partition {spec.title}", inputs)
        )["groups"]

    def sensitivity(self, groups: TableRef, blocks: TableRef) -> References:
        """Sensitivity and loss tables; a task per shard, keyed by weights and the shard's tokens."""
        spec, part = self.spec, self.spec.calibration
        formats, code = (
            sorted(self.measured),
            code_of(
                "loss.sensitivity",
                "loss.cross_entropy",
                "models.attention",
                "models.linears",
                "formats.quantize",
                "formats.format",
                "models.checkpoint",
                "models.quantized",
                "store.tables",
            ),
        )
        shards = calibration.blocks_of(blocks).shards(part.shards)
        results = self.stages.run(
            "sensitivity",
            [
                (
                    calibration.sensitivity_shard,
                    content_key(
                        self.content, shard.key, groups.sha256, formats, spec.base_term, code
                    ),
                    f"sensitivity {spec.title} shard {k + 1}/{len(shards)}",
                    {
                        "model": self.model,
                        "groups": groups,
                        "blocks": blocks,
                        "shard": k,
                        "shards": len(shards),
                        "formats": formats,
                        "batch": part.batch,
                        "base_term": spec.base_term,
                        "checkpoint_activations": part.checkpoint_activations,
                    },
                )
                for k, shard in enumerate(shards)
            ],
            "workers",
        )
        sensitivities, losses = [r["sensitivity"] for r in results], [r["loss"] for r in results]
        key = content_key([r.sha256 for r in (*sensitivities, *losses)], code)
        inputs = {"sensitivities": sensitivities, "losses": losses}
        return self.stages.run_one(
            "merge shards", (calibration.merge_shards, key, f"merge {spec.title}", inputs)
        )

    def timing(self, groups: TableRef, architecture: str) -> list[TableRef]:
        """The timing table of the configurations to begin with.

        Keyed by the whole architecture, not by the signature's shapes alone: a row carries the model's own TTFT.
        """
        from mpq.timing.design import design

        part = self.spec.timing
        wanted = [
            (signature, c)
            for signature, choices in self._choices(groups).items()
            for c in design(choices, part.limit, part.seed)
        ]
        return self._measured("timing", groups, architecture, wanted)

    def _choices(self, groups: TableRef) -> dict[str, list[tuple[str, ...]]]:
        """For each signature, in the model's order, the formats that its ops may take."""
        from mpq.kernels import native_formats
        from mpq.timing.design import choices_of

        spec = self.spec
        native = {
            kind: self.stages.place.ask(native_formats, spec.model.device, kind) for kind in KINDS
        }
        formats: dict[str, list[str]] = {
            k: [f for f in spec.objectives["et"].formats if f in native[k]] for k in KINDS
        }
        frame = read(groups)
        found: dict[str, list[tuple[str, ...]]] = {}
        for (signature, _), rows in frame.sort("order").group_by(
            ["signature", "group"], maintain_order=True
        ):
            found.setdefault(str(signature), choices_of(rows, formats, spec.model.base))
        return found

    def _measured(
        self, stage: str, groups: TableRef, architecture: str, wanted: Sequence[Wanted]
    ) -> list[TableRef]:
        """One timing table of everything wanted; what the store has not is measured, an entry a configuration."""
        base, part = (
            self.spec.model.base,
            self.spec.timing.model_dump(exclude={"slice", "bound", "limit", "rounds"}),
        )
        keys = {
            content_key(architecture, groups.sha256, s, c, base, part, self._made_with): (s, c)
            for s, c in wanted
        }
        key, store = content_key(list(keys), code_of("store.tables")), Store(self.stages.store)
        found: dict[str, TableRef] = {}
        if not store.find("timing", key):
            found = store.find_all("measurement", keys)
            if missing := {k: w for k, w in keys.items() if k not in found}:
                for measured in self.stages.run(
                    f"{stage}: measure", self._slices(missing, groups, architecture), "accelerator"
                ):
                    found |= measured
        inputs = {"groups": groups, "measurements": [found[k] for k in keys if k in found]}
        label = f"{stage} {self.spec.title}"
        return [
            self.stages.run_one(stage, (timing.merge_measurements, key, label, inputs))["timing"]
        ]

    def _slices(
        self, missing: dict[str, Wanted], groups: TableRef, architecture: str
    ) -> list[Call]:
        """Tasks for what is to be measured, some configurations of one signature each.

        In an order of this flow run's own: of two runs at once, each finds done what the other began with.
        """
        spec, size = self.spec, self.spec.timing.slice or self._slice(len(missing), architecture)
        calls: list[Call] = []
        for signature in dict.fromkeys(s for s, _ in missing.values()):
            every = [k for k, (s, _) in missing.items() if s == signature]
            for at in range(0, len(every), size):
                some = {k: missing[k] for k in every[at : at + size]}
                calls.append(
                    (
                        timing.time_configurations,
                        content_key(list(some)),
                        f"timing {spec.title} {signature} {at + 1}-{at + len(some)} of {len(every)}",
                        {
                            "folder": self.source,
                            "base": spec.model.base,
                            "device": spec.model.device,
                            "groups": groups,
                            "wanted": some,
                            "spec": spec.timing,
                            "made_on": self.device_name,
                        },
                    )
                )
        random.Random(str(flow_run.id)).shuffle(calls)
        return calls

    def _slice(self, configurations: int, architecture: str) -> int:
        """Configurations per task, from how many there are, how many accelerators, and what a task costs on one."""
        place, part, model = self.stages.place, self.spec.timing, self.spec.model
        if place.accelerators <= 1:
            return configurations
        key = content_key(
            architecture, model.base, model.device, part.batch, part.length, self._made_with
        )
        inputs = {
            "folder": self.source,
            "base": model.base,
            "device": model.device,
            "spec": part,
            "made_on": self.device_name,
        }
        call = (timing.probe, key, f"probe {self.spec.title}", inputs)
        told = read_json(self.stages.run_one("probe", call, "accelerator")["probe"])
        cost = TaskCost(
            build_s=told["build_s"], configuration_s=seconds_of(part.repeats, told["ttft_s"])
        )
        return slice_size(configurations, place.accelerators, cost)

    def plans(
        self, groups: TableRef, sums: References, timed: list[TableRef], architecture: str
    ) -> tuple[list[References], list[TableRef]]:
        """Plans for each objective, and the timing tables that they rest on: for measured time it solves, measures what was
        chosen and not yet measured, and solves again."""
        from mpq.timing.design import anchors, refine

        spec, objectives = self.spec, list(self.objectives)

        def chosen(timed: list[TableRef]) -> list[Wanted]:
            solved = self._solve(
                ["et"], groups, sums, timed, self._gains(["et"], groups, sums, timed)
            )
            return self._unmeasured(groups, timed, solved[0])

        def measure(timed: list[TableRef], wanted: list[Wanted]) -> list[TableRef]:
            return [*timed, *self._measured("timing of chosen", groups, architecture, wanted)]

        timed, _ = refine(timed, chosen, measure, spec.timing.rounds if timed else 0)
        gains = self._gains(objectives, groups, sums, timed)
        anchor = None
        if timed:
            whole = anchors(
                read(groups), read(gains[objectives.index("et")]["gains"]), spec.model.base
            )
            anchor = (
                self.time_plans(
                    groups, whole, self.held_out.ttft_repeats, architecture, "TTFT of anchors"
                )
                if whole
                else None
            )
        solved = self._solve(objectives, groups, sums, timed, gains, anchor)
        if timed and (left := self._unmeasured(groups, timed, solved[objectives.index("et")])):
            tell(
                f"{len(left)} configurations of the plans for et are predicted, not measured: timing.rounds was {spec.timing.rounds}."
            )
        return solved, timed

    def _unmeasured(
        self, groups: TableRef, timed: list[TableRef], solved: References
    ) -> list[Wanted]:
        """What IP-ET's plans put a group in and no timing table has measured."""
        from mpq.timing.design import unmeasured

        plans = [p["formats"] for p in read_json(solved["plan_files"]) if p["strategy"] == "ip_et"]
        timing = pl.concat([read(t) for t in timed], how="diagonal_relaxed")
        return unmeasured(timing, read(groups), plans, self.spec.model.base)

    def _gains(
        self,
        objectives: Sequence[Objective],
        groups: TableRef,
        sums: References,
        timed: list[TableRef],
    ) -> list[References]:
        spec, base = self.spec, self.spec.model.base
        calls: list[Call] = []
        for objective in objectives:
            formats, of = spec.objectives[objective].formats, timed if objective == "et" else []
            choices = self._choices(groups) if objective == "et" else {}
            key = content_key(
                objective,
                groups.sha256,
                sums["sensitivity"].sha256,
                [t.sha256 for t in of],
                formats,
                base,
                spec.noise_model,
                spec.timing.bound,
                code_of(
                    "program.gains",
                    "timing.design",
                    "timing.gain_model",
                    "formats.format",
                    "store.tables",
                ),
            )
            inputs = {
                "objective": objective,
                "groups": groups,
                "sensitivity": sums["sensitivity"],
                "timing": of,
                "formats": list(formats),
                "base": base,
                "noise_model": spec.noise_model,
                "bound": spec.timing.bound,
                "choices": choices,
            }
            calls.append((planning.build_gains, key, f"gains {objective} {spec.title}", inputs))
        return self.stages.run("gains", calls)

    def _solve(
        self,
        objectives: Sequence[Objective],
        groups: TableRef,
        sums: References,
        timed: list[TableRef],
        gains: Sequence[References],
        anchor: TableRef | None = None,
    ) -> list[References]:
        spec, base = self.spec, self.spec.model.base
        versions = {
            name: version(name) for name in ("mpq", "torch", "transformers", "highspy", "gurobipy")
        }
        keys = {"sensitivity": sums["sensitivity"].key, "loss": sums["loss"].key}
        calls: list[Call] = []
        for objective, built in zip(objectives, gains, strict=True):
            part, of = spec.objectives[objective], timed if objective == "et" else []
            taus, anchored = list(part.taus or spec.taus), anchor if objective == "et" else None
            key = content_key(
                objective,
                part,
                groups.sha256,
                built["gains"].sha256,
                sums["loss"].sha256,
                taus,
                base,
                spec.solver,
                self.fingerprint,
                anchored and anchored.sha256,
                code_of(
                    "program.solver",
                    "program.presolve",
                    "program.strategies",
                    "program.gains",
                    "timing.design",
                    "program.plan",
                    "store.tables",
                ),
            )
            inputs = {
                "objective": objective,
                "part": part,
                "groups": groups,
                "gains": built["gains"],
                "loss": sums["loss"],
                "timing": of,
                "taus": taus,
                "base": base,
                "solver": spec.solver,
                "fingerprint": self.fingerprint,
                "anchor": anchored,
                "provenance": {"gains": built["gains"].key, **keys, "versions": versions},
            }
            calls.append((planning.solve, key, f"solve {objective} {spec.title}", inputs))
        return self.stages.run("solve", calls)

    def time_plans(
        self,
        groups: TableRef,
        plans: list[dict[str, str]],
        repeats: int,
        architecture: str,
        stage: str = "TTFT of plans",
    ) -> TableRef:
        """TTFT of whole plans (op → format), base interleaved; keyed without weights, so a fine-tune re-uses it, but by stage:
        what a prediction rests on is not what it is held against."""
        spec, part = (
            self.spec,
            self.spec.timing.model_dump(include={"batch", "length", "seed", "compile", "graph"}),
        )
        inputs = {
            "folder": self.source,
            "base": spec.model.base,
            "device": spec.model.device,
            "groups": groups,
            "plans": plans,
            "repeats": repeats,
            "spec": spec.timing,
            "made_on": self.device_name,
        }
        key = content_key(
            stage,
            architecture,
            groups.sha256,
            plans,
            spec.model.base,
            part,
            repeats,
            self._made_with,
        )
        call = (timing.time_plans, key, f"{stage} {spec.title}", inputs)
        return self.stages.run_one(stage, call, "accelerator")["plan_ttft"]


def code_of(*modules: str) -> str:
    """The version of the named modules of mpq, for keys."""
    return code_version(*(f"mpq.{m}" for m in modules))
