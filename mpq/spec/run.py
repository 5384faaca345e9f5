"""What a run is: every key of its YAML file, with its type, its default and what it is for."""

from __future__ import annotations

import logging
import math
import re
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from mpq.formats.format import NoiseModel
from mpq.formats.scheme import get_scheme, of_cache
from mpq.spec.bound import Bound, BoundSpec
from mpq.spec.constraints import ConstraintSpec, EngineName, TargetSpec
from mpq.spec.export import READERS, ExportSpec
from mpq.spec.fields import Count, FormatName, LocalFolder, Number, Strict, Url, Whole
from mpq.spec.timing import TimingSpec, WorkloadSpec

log = logging.getLogger("mpq")
FROM_TASKS = "tasks"  # a text source: documents of the tasks that are evaluated
_TAUS = (1e-12, 100.0)  # beyond these τ² is nothing, or no bound


def _bounds(taus: tuple[float, ...]) -> tuple[float, ...]:
    low, high = _TAUS
    for tau in taus:
        if not (tau > 0 and math.isfinite(tau)):
            raise ValueError(f"τ must be above zero, got {tau:g}")
        if not low <= tau <= high:
            raise ValueError(
                f"τ must lie between {low:g} and {high:g}, got {tau:g}: "
                "it is a share of the loss, 0.002 allows 0.2 %"
            )
    different = tuple(sorted(set(taus)))
    for one, other in pairwise(different):
        if f"{one:g}" == f"{other:g}":  # plans are called by it
            raise ValueError(f"two τ are {one:g} in six digits: leave one of them out")
    return different


def _inside(name: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not name.strip(" ./"):
        raise ValueError(f"must be a folder's name below `out`, not {name!r}")
    if len(name.encode()) > 200:
        raise ValueError("must be at most 200 bytes long: a folder is called by it")
    return name


Taus = Annotated[tuple[Number, ...], AfterValidator(_bounds)]
Objective = Literal["et", "tt", "m"]
Strategy = Literal["ip", "random", "prefix", "uniform"]


class TextSpec(Strict):
    """Text to calibrate or evaluate on, cut into `samples` blocks of `length` tokens."""

    source: Url = Field(
        description="A text file, JSONL, Parquet (.gz too), .npy token array, fsspec URL of one, a folder of a dataset or its Hugging Face id, "
        "`id:configuration` where it has several (wikitext:wikitext-2-raw-v1), or `tasks`: the evaluated tasks' documents"
    )
    samples: Count | None = Field(
        64, description="Blocks of tokens drawn; null for all that there are"
    )
    length: Count = Field(256, ge=2, description="Tokens per block")
    batch: Count = Field(8, description="Blocks per forward pass")
    seed: Whole = Field(0, description="Seed of the draw")
    field: str = Field(
        "text",
        description="JSONL key or dataset column that holds the text, chat messages, or token ids (input_ids)",
    )
    split: str = Field("train", description="Split of a Hugging Face dataset")
    revision: str | None = Field(None, description="Revision of a Hugging Face dataset")


class CalibrationSpec(TextSpec):
    """Calibration text, and how its cost is spread."""

    share: Number = Field(
        0.2,
        gt=0,
        lt=1,
        description="With source `tasks`: share of each task's documents that calibrates; the loss is evaluated on the others",
    )
    shards: Count = Field(
        4, description="Tasks over which the samples are spread; their sums add up exactly"
    )
    checkpoint_activations: bool = Field(
        False, description="Recompute activations in the backward pass to save memory"
    )
    labels: Count = Field(
        1,
        description="Draws of labels that predicted KL is the mean over, a backward pass each: more where its error is large "
        "and text is scarce",
    )


class ModelSpec(Strict):
    """Which checkpoint, and the format it runs in when nothing is lowered."""

    path: Url = Field(
        description="Hub id, local folder or fsspec URL of a checkpoint in Hugging Face layout"
    )
    revision: str | None = Field(None, description="Revision of a hub id")
    trust_remote_code: bool = Field(
        False, description="Run the Python code that a checkpoint brings along: read it first"
    )
    check_weights: bool = Field(
        False,
        description="Read all weights to hash them, whatever is known of unchanged files (`mpq run --check-weights`)",
    )
    memory_gb: Number | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="GB of memory that a run may take; a model that needs more is read from disk layer by layer "
        "(docs/memory.md); null: what is free",
    )
    base: FormatName = Field(
        "bf16", description="Format where nothing is lowered: fp32, bf16 or fp16"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d{1,4})?)$",
        description="Where it runs: cpu, cuda or cuda:N; auto: the first GPU where there is one, else cpu. What does not fit is "
        "spread over the other GPUs (not with cuda:1 and on), memory and disk",
    )

    @field_validator("base")
    @classmethod
    def _wide(cls, name: str) -> str:
        if get_scheme(name).weights.needs_scale:
            raise ValueError(f"the base format must be fp32, bf16 or fp16, not {name}")
        return name


class ObjectiveSpec(Strict):
    """One objective: et (measured time), tt (MAC time) or m (memory), and the formats that it may choose."""

    formats: tuple[FormatName, ...] = Field(
        min_length=1, description="Formats to lower to, base left out"
    )
    strategies: tuple[Strategy, ...] = Field(
        ("ip", "random", "prefix", "uniform"),
        description="How plans are chosen: ip, by the integer program; random and prefix, op by op "
        "in that order until the bound is met; uniform, everything in one format",
    )
    random_seeds: Count = Field(1, description="Draws of the random strategy")
    taus: Taus | None = Field(
        None, min_length=1, description="τ of this objective, where they are not the run's"
    )


class EvaluationSpec(TextSpec):
    """Held-out text on which plans are measured."""

    seeds: Count = Field(3, description="Perturbations of the scales")
    ttft_repeats: Count = Field(
        11,
        ge=3,
        description="Interleaved pairs per plan; formats that are not native are not timed",
    )
    tasks: tuple[str, ...] = Field(
        (),
        description="lm-evaluation-harness tasks, such as hellaswag, beside the loss on the text",
    )
    data_dir: Url | None = Field(
        None, description="Folder of <task>/<split>.jsonl to read the tasks from; else the hub"
    )
    task_limit: Count | None = Field(
        None, description="First documents of each task that evaluate; else all"
    )


class RunnerSpec(Strict):
    """Where the long tasks of a run go: the machine of the flow, or the workers of a cluster."""

    timeout_s: Number | None = Field(
        21600,
        gt=0,
        description="Seconds after which a task is given up, its wait for the device included; long stages try once more",
    )
    kind: Literal["local", "dask", "ray"] = Field(
        "local", description="local: beside the flow, one at a time; or a cluster"
    )
    address: Url | None = Field(
        None,
        description="The Dask scheduler (tcp://scheduler:8786), or Ray's head (head:6379, or ray://head:10001 from outside)",
    )

    @model_validator(mode="after")
    def _reachable(self) -> RunnerSpec:
        address = self.address or ""
        if self.kind == "dask" and not re.fullmatch(r"(tcp|tls|ucx|ws|wss)://.+:\d+", address):
            raise ValueError(
                f"the dask runner needs the scheduler's address, such as tcp://scheduler:8786, not {self.address}"
            )
        if self.kind == "ray" and not re.fullmatch(r"(ray://)?[^/\s]+:\d+", address):
            raise ValueError(
                f"the ray runner needs the cluster's address, such as head:6379 or ray://head:10001, not {self.address}"
            )
        if self.kind == "local" and self.address:
            raise ValueError(
                "the local runner has no address: set kind to dask or ray, or leave the address out"
            )
        return self


class RunSpec(Strict):
    """A whole run: model → plans under each τ for each objective, evaluated and reported."""

    name: Annotated[str, AfterValidator(_inside)] = Field(
        "run", description="Name in logs, reports and Prefect, and of the folder below `out`"
    )
    model: ModelSpec = Field(
        description="Which checkpoint, and the format it runs in when nothing is lowered"
    )
    calibration: CalibrationSpec = Field(description="Text on which sensitivity is measured")
    evaluation: EvaluationSpec | None = Field(
        None, description="Held-out text on which plans are measured; else the calibration text"
    )
    workload: WorkloadSpec | None = Field(
        None,
        description="The requests whose time counts, and whose cache where that is decided, {prompt: 1024, output: 128, batch: 8}: what "
        "`timing` says as length, output and batch",
    )
    timing: TimingSpec = Field(TimingSpec(), description="Which times are measured, and how")
    objectives: dict[Objective, ObjectiveSpec] = Field(
        min_length=1,
        description="What is gained: et, measured time; tt, MAC time; m, memory; and the formats to choose from",
    )
    engine: EngineName = Field(
        "none",
        description="What shall serve the plans: brings its own ties, formats and exclusions "
        "(mpq/program/engines.py); none: nothing is ruled out",
    )
    constraints: ConstraintSpec = Field(
        ConstraintSpec(), description="What plans may choose, beside the engine's own rules"
    )
    target: TargetSpec | None = Field(
        None,
        description="The objective turned round: a further plan, `ip_loss`, of the smallest "
        "predicted loss for this size or time",
    )
    taus: Taus = Field(
        (0.003, 0.01, 0.03),
        min_length=1,
        description="Bounds τ on the normalised RMSE of the loss: 0.002 allows it to move by 0.2 %",
    )
    bound: BoundSpec | None = Field(
        None,
        description="Bounds on KL or perplexity, in place of `taus`, or on several together; a plan for each value",
    )
    noise_model: NoiseModel = Field(
        "actual",
        description="Rounding's error in the loss MSE: actual, as it happens; ulp, by the binade of each value; "
        "paper, by the value itself",
    )
    base_term: bool = Field(
        True,
        description="Subtract the base format's own noise (docs/method.md); false is the paper's form",
    )
    solver: Literal["auto", "highs", "gurobi"] = Field(
        "auto",
        description="What solves the integer program; auto: a solver only for what presolving leaves open",
    )
    store: Url = Field(
        ".work/store",
        description="Where tables are kept and found again: a folder or an fsspec URL",
    )
    runner: RunnerSpec = Field(
        RunnerSpec(), description="Where sensitivity, timing and evaluation run"
    )
    out: LocalFolder = Field(".work/runs", description="Local folder for plans and the report")
    export: ExportSpec | None = Field(
        None,
        description="End with a checkpoint that an engine serves (docs/engines.md); null: with plans alone",
    )

    @model_validator(mode="after")
    def _of_workload(self) -> RunSpec:
        if self.workload:  # stages read it off `timing`, however it was written
            object.__setattr__(self, "timing", self.timing.of(self.workload))
        return self

    @model_validator(mode="after")
    def _lowered(self) -> RunSpec:
        for objective, part in self.objectives.items():
            if self.model.base in part.formats:
                raise ValueError(
                    f"objectives.{objective}.formats lists the base format {self.model.base}: list what to lower to"
                )
            caches = of_cache(part.formats)
            if objective != "m" and caches:
                raise ValueError(
                    f"objectives.{objective}.formats lists {caches[0]}, which gains bytes of the cache alone: list it under m"
                )
            said = self.workload or {"batch", "length"} <= self.timing.model_fields_set
            if caches and not said:
                raise ValueError(
                    f"objectives.m.formats lists {caches[0]}, which gains bytes of the cache: say of which requests, "
                    "as workload: {prompt: 1024, output: 128, batch: 8}"
                )
        return self

    @model_validator(mode="after")
    def _bounded_once(self) -> RunSpec:
        if self.bound and self.taus != RunSpec.model_fields["taus"].default:
            raise ValueError("taus and bound both bound the plans: move taus into bound, as tau")
        measured_on = self.evaluation or self.calibration
        if self.bound and self.bound.robust is not None and measured_on.samples == 1:
            raise ValueError(
                "bound.robust needs the spread of what is measured over blocks of text: "
                f"set {'evaluation' if self.evaluation else 'calibration'}.samples to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _has_tasks(self) -> RunSpec:
        if self.evaluation and self.evaluation.tasks:
            return self
        for name, part in (("calibration", self.calibration), ("evaluation", self.evaluation)):
            if part and part.source == FROM_TASKS:
                raise ValueError(
                    f"{name}.source is `{FROM_TASKS}`, but no tasks are evaluated: name some in evaluation.tasks"
                )
        return self

    @model_validator(mode="after")
    def _measured(self) -> RunSpec:
        known = {"base", self.model.base, *self.formats}
        for pattern, formats in self.constraints.pin.items():
            if unknown := [f for f in formats if f not in known]:
                raise ValueError(
                    f"constraints.pin: {pattern} is pinned to {unknown[0]}, which no objective "
                    f"measures: expected base or one of {', '.join(self.formats)}"
                )
        if unknown := [f for f in self.constraints.bounds.min_share if f not in known - {"base"}]:
            raise ValueError(
                f"constraints.bounds.min_share: no objective lowers to {unknown[0]}: "
                f"expected one of {', '.join(self.formats)}"
            )
        blocked = [f for f in self.formats if not get_scheme(f).alike]
        if blocked and self.noise_model != "actual":
            raise ValueError(
                f"noise_model: {self.noise_model} knows no variance of {blocked[0]}, whose scales are of "
                "blocks or whose activations stay in base: expected actual"
            )
        if self.bound and self.bound.signed and self.noise_model != "actual":
            raise ValueError(
                f"bound.signed is of the rounding that happens, noise_model is {self.noise_model}: set it to actual"
            )
        if self.target and self.target.ttft_ms and "et" not in self.objectives:
            raise ValueError(
                "target.ttft_ms needs measured times: add the objective et, or set a target of "
                "effective_bits or weight_bytes"
            )
        return self

    @model_validator(mode="after")
    def _timed_where_served(self) -> RunSpec:
        if self.timing.engine == "vllm" and self.engine != "vllm":
            raise ValueError(
                f"timing.engine is vllm, whose rules plans must keep to be timed: set engine to vllm, not {self.engine}"
            )
        return self

    @model_validator(mode="after")
    def _servable(self) -> RunSpec:
        to = self.export.to if self.export else "json"
        served = READERS[to]
        if served and self.engine not in served:
            raise ValueError(
                f"export.to {to} needs plans that keep to an engine's rules: set engine to {' or '.join(served)}, not {self.engine}"
            )
        return self

    @property
    def constrained(self) -> bool:
        """Whether anything rules out what plans may choose, beside the loss."""
        return self.engine != "none" or self.constraints != ConstraintSpec()

    @property
    def title(self) -> str:
        """What tasks and flow runs are called by: the name, and the model's where the name does not say it."""
        model = self.model.path.rstrip("/").rpartition("/")[2]
        return self.name if model in self.name else f"{self.name} {model}"

    def limits(self, objective: Objective) -> tuple[Bound, ...]:
        """What bounds the plans of an objective: its own τ, or the run's bounds."""
        own = self.objectives[objective].taus if objective in self.objectives else None
        if own is None and self.bound:
            return self.bound.limits
        signed = self.bound is not None and self.bound.signed
        return tuple(Bound(tau, signed=signed) for tau in own or self.taus)

    def checks_kl(self, objective: Objective) -> bool:
        """Whether plans of an objective are measured before they are delivered: those under a bound on KL."""
        rounds = self.bound.rounds if self.bound else 0
        return rounds > 0 and any(limit.kl is not None for limit in self.limits(objective))

    @property
    def formats(self) -> tuple[str, ...]:
        """Every format that some objective may choose, each once, in the order given."""
        return tuple(dict.fromkeys(f for part in self.objectives.values() for f in part.formats))
