"""What a run is: one YAML file, checked before anything is computed."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mpq.errors import MpqError
from mpq.formats.format import NoiseModel, get_format
from mpq.redaction import without_credentials


def _format(name: str) -> str:
    return get_format(name).name


def _positive(taus: tuple[float, ...]) -> tuple[float, ...]:
    if bad := [t for t in taus if not (t > 0 and math.isfinite(t))]:
        raise ValueError(f"τ must be above zero, got {bad[0]:g}")
    return tuple(sorted(set(taus)))


FormatName = Annotated[str, AfterValidator(_format)]
Taus = Annotated[tuple[float, ...], AfterValidator(_positive)]
Url = Annotated[str, AfterValidator(without_credentials)]
Objective = Literal["et", "tt", "m"]
FROM_TASKS = "tasks"  # a text source: documents of the tasks that are evaluated
Strategy = Literal["ip", "random", "prefix"]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True
    )  # an input may hold a secret


class TextSpec(_Strict):
    """Text to calibrate or evaluate on, cut into `samples` blocks of `length` tokens."""

    source: Url = Field(
        description="A text file, JSONL, Parquet (.gz too), .npy token array, fsspec URL of one, a folder of a dataset or its Hugging Face id, "
        "`id:configuration` where it has several (wikitext:wikitext-2-raw-v1), or `tasks`: the evaluated tasks' documents"
    )
    samples: int | None = Field(
        64, ge=1, description="Blocks of tokens drawn; null for all that there are"
    )
    length: int = Field(256, ge=2, description="Tokens per block")
    batch: int = Field(8, ge=1, description="Blocks per forward pass")
    seed: int = Field(0, description="Seed of the draw")
    field: str = Field(
        "text",
        description="JSONL key or dataset column that holds the text, chat messages, or token ids (input_ids)",
    )
    split: str = Field("train", description="Split of a Hugging Face dataset")
    revision: str | None = Field(None, description="Revision of a Hugging Face dataset")


class CalibrationSpec(TextSpec):
    """Calibration text, and how its cost is spread."""

    share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="With source `tasks`: share of each task's documents that calibrates; the loss is evaluated on the others",
    )
    shards: int = Field(
        4, ge=1, description="Tasks over which the samples are spread; their sums add up exactly"
    )
    checkpoint_activations: bool = Field(
        False, description="Recompute activations in the backward pass to save memory"
    )


class ModelSpec(_Strict):
    """Which checkpoint, and the format it runs in when nothing is lowered."""

    path: Url = Field(
        description="Hub id, local folder or fsspec URL of a checkpoint in Hugging Face layout"
    )
    revision: str | None = Field(None, description="Revision of a hub id")
    base: FormatName = Field("bf16", description="Base format: fp32, bf16 or fp16")
    device: str = Field(
        "cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="Where it runs: cpu, cuda or cuda:N"
    )

    @field_validator("base")
    @classmethod
    def _wide(cls, name: str) -> str:
        if get_format(name).needs_scale:
            raise ValueError(f"the base format must be fp32, bf16 or fp16, not {name}")
        return name


class ObjectiveSpec(_Strict):
    """One objective: et (measured time), tt (MAC time) or m (memory), and the formats that it may choose."""

    formats: tuple[FormatName, ...] = Field(
        min_length=1, description="Formats to lower to, base left out"
    )
    strategies: tuple[Strategy, ...] = Field(
        ("ip", "random", "prefix"), description="How plans are chosen"
    )
    random_seeds: int = Field(1, ge=1, description="Draws of the random strategy")
    taus: Taus | None = Field(
        None, min_length=1, description="τ of this objective, where they are not the run's"
    )


class TimingSpec(_Strict):
    """How TTFT is measured."""

    batch: int = Field(4, ge=1, description="Rows of the prefill")
    length: int = Field(256, ge=1, description="Tokens per row")
    repeats: int = Field(7, ge=2, description="Interleaved pairs of base and configuration")
    method: Literal["signature", "group"] = Field(
        "signature", description="Switch all groups of a signature, or one (the paper)"
    )
    limit: int = Field(
        64,
        ge=8,
        description="Configurations of a signature measured at first; the rest are predicted, and measured where chosen",
    )
    rounds: int = Field(6, ge=0, description="Rounds of solving and measuring what was chosen")
    slice: int | None = Field(
        None, ge=1, description="Configurations per task; chosen by what a task costs, if left out"
    )
    bound: Literal["pooled", "mean", "lower", "cautious"] = Field(
        "pooled",
        description="Plan with what all configurations of a signature together say of a gain, with the gain as measured, with its "
        "interval's lower end, or with that where the interval includes zero",
    )
    target: float | None = Field(
        None, gt=0, lt=1, description="Repeat until gains are known to ± this share of TTFT"
    )
    cap: int | None = Field(
        None, ge=2, description="Pairs at most; 2 x repeats, or 4 x with a target, if left out"
    )
    compile: bool = Field(
        False,
        description="Time the model's blocks through torch.compile, base and configurations alike",
    )
    graph: bool = Field(
        True, description="On CUDA, replay captured graphs, so that launches do not hide gains"
    )
    seed: int = Field(0, description="Seed of order, tokens and bootstrap")


class EvaluationSpec(TextSpec):
    """Held-out text on which plans are measured."""

    seeds: int = Field(3, ge=1, description="Perturbations of the scales")
    ttft_repeats: int = Field(
        11,
        ge=3,
        description="Interleaved pairs per plan; formats that are not native are not timed",
    )
    tasks: tuple[str, ...] = Field(
        (),
        description="lm-evaluation-harness tasks, such as hellaswag, beside the loss on the text",
    )
    data_dir: str | None = Field(
        None, description="Folder of <task>/<split>.jsonl to read the tasks from; else the hub"
    )
    task_limit: int | None = Field(
        None, ge=1, description="First documents of each task that evaluate; else all"
    )


class RunnerSpec(_Strict):
    """Where the long tasks of a run go: the machine of the flow, or the workers of a cluster."""

    timeout_s: float | None = Field(
        21600,
        gt=0,
        description="Seconds after which a task is given up, its wait for the device included; long stages try once more",
    )
    kind: Literal["local", "dask", "ray"] = Field(
        "local", description="local: beside the flow, one at a time; or a cluster"
    )
    address: str | None = Field(
        None,
        description="The Dask scheduler (tcp://scheduler:8786), or Ray's head (head:6379, or ray://head:10001 from outside)",
    )

    @model_validator(mode="after")
    def _reachable(self) -> RunnerSpec:
        if self.kind == "dask" and not re.fullmatch(
            r"(tcp|tls|ucx|ws|wss)://.+:\d+", self.address or ""
        ):
            raise ValueError(
                f"the dask runner needs the scheduler's address, such as tcp://scheduler:8786, not {self.address}"
            )
        if self.kind == "ray" and not re.fullmatch(r"(ray://)?[^/\s]+:\d+", self.address or ""):
            raise ValueError(
                f"the ray runner needs the cluster's address, such as head:6379 or ray://head:10001, not {self.address}"
            )
        if self.kind == "local" and self.address:
            raise ValueError(
                "the local runner has no address: set kind to dask or ray, or leave the address out"
            )
        return self


class RunSpec(_Strict):
    """A whole run: model → plans under each τ for each objective, evaluated and reported."""

    name: str = Field("run", description="Name in logs, reports and Prefect")
    model: ModelSpec = Field(
        description="Which checkpoint, and the format it runs in when nothing is lowered"
    )
    calibration: CalibrationSpec = Field(description="Text on which sensitivity is measured")
    evaluation: EvaluationSpec | None = Field(
        None, description="Held-out text on which plans are measured; else the calibration text"
    )
    timing: TimingSpec = Field(TimingSpec(), description="How TTFT is measured")
    objectives: dict[Objective, ObjectiveSpec] = Field(
        min_length=1,
        description="What is gained: et, measured time; tt, MAC time; m, memory; and the formats to choose from",
    )
    taus: Taus = Field(
        (0.003, 0.01, 0.03), min_length=1, description="Bounds on the normalised RMSE of the loss"
    )
    noise_model: NoiseModel = Field(
        "ulp",
        description="Variance of rounding: ulp, by the binade of each value; paper, by the value itself",
    )
    base_term: bool = Field(
        True,
        description="Subtract the base format's own noise (method.md); False is the paper's form",
    )
    solver: Literal["auto", "highs", "gurobi"] = Field(
        "auto",
        description="What solves the integer program; auto: a solver only for what presolving leaves open",
    )
    store: Url = Field(".work/store", description="fsspec URL of the tables")
    runner: RunnerSpec = Field(
        RunnerSpec(), description="Where sensitivity, timing and evaluation run"
    )
    out: str = Field(".work/runs", description="Local folder for plans and the report")

    @model_validator(mode="after")
    def _lowered(self) -> RunSpec:
        for objective, part in self.objectives.items():
            if self.model.base in part.formats:
                raise ValueError(
                    f"objectives.{objective}.formats lists the base format {self.model.base}: list what to lower to"
                )
        return self

    @model_validator(mode="after")
    def _has_tasks(self) -> RunSpec:
        for name, part in (("calibration", self.calibration), ("evaluation", self.evaluation)):
            if (
                part
                and part.source == FROM_TASKS
                and not (self.evaluation and self.evaluation.tasks)
            ):
                raise ValueError(
                    f"{name}.source is `{FROM_TASKS}`, but no tasks are evaluated: name some in evaluation.tasks"
                )
        return self

    @property
    def title(self) -> str:
        """What tasks and flow runs are called by: the name, and the model's where the name does not say it."""
        model = self.model.path.rstrip("/").rpartition("/")[2]
        return self.name if model in self.name else f"{self.name} {model}"

    @property
    def formats(self) -> tuple[str, ...]:
        """Every format that some objective may choose, each once, in the order given."""
        return tuple(dict.fromkeys(f for part in self.objectives.values() for f in part.formats))


def load_spec(path: str | Path) -> RunSpec:
    """Read and check a spec. Raises MpqError with the file, the key and what was expected there."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MpqError(
            f"No spec at {path}: expected a YAML file such as examples/demo.yaml."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise MpqError(f"The spec {path} cannot be read: {' '.join(str(error).split())}.") from None
    return parse_spec(data, str(path))


def parse_spec(data: Any, where: str = "the spec") -> RunSpec:
    """A RunSpec from plain data. Raises MpqError for the first thing wrong with it."""
    if not isinstance(data, dict):
        raise MpqError(
            f"{where} is not a spec: expected a mapping with the keys {', '.join(RunSpec.model_fields)}."
        )
    try:
        return RunSpec.model_validate(data)
    except ValidationError as error:
        raise MpqError(f"{where}: {_told(error)}") from None


def _told(error: ValidationError) -> str:
    # a misspelt key also leaves one missing: the key is what the user wrote
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    at = ".".join(str(part) for part in first["loc"]) or "the spec"
    if first["type"] == "extra_forbidden":
        known = _siblings(first["loc"])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        return f"unknown key {at}{f' (did you mean {close[0]}?)' if close else ''}: expected one of {', '.join(known)}."
    if first["type"] == "missing":
        return f"{at} is missing: it is required."
    message = first["msg"].removeprefix("Value error, ")
    return f"{at}: {message}{'' if message.endswith('.') else '.'}"


def _siblings(loc: tuple[int | str, ...]) -> list[str]:
    model: Any = RunSpec
    for part in loc[:-1]:
        if part in getattr(model, "model_fields", {}):
            kinds = [
                model.model_fields[part].annotation,
                *getattr(model.model_fields[part].annotation, "__args__", ()),
            ]
            model = next(
                (k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), model
            )
    return list(model.model_fields)
