"""Which times are measured, and how, as a spec says it."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mpq.spec.fields import Count, Number, Strict, Whole

log = logging.getLogger("mpq")


class WorkloadSpec(Strict):
    """The requests whose time counts: another way to write timing's length, output and batch."""

    prompt: Count | None = Field(None, description="Tokens of a prompt; timing.length if left out")
    output: Count | None = Field(None, description="Tokens of an answer; timing.output if left out")
    batch: Count | None = Field(None, description="Requests at once; timing.batch if left out")


class TimingSpec(Strict):
    """Which times are measured, and how."""

    engine: Literal["torch", "vllm"] = Field(
        "torch",
        description="What is timed: this process's torch on the device's native kernels, or vLLM, installed by itself (docs/engines.md)",
    )
    batch: Count = Field(4, description="Rows of the prefill")
    length: Count = Field(256, description="Tokens per row")
    output: Count = Field(
        1,
        exclude_if=lambda tokens: tokens == 1,
        description="Tokens of an answer. 1: the time to first token counts, as in the paper; else that of the whole answer, "
        "TTFT + (output - 1) × the time per output token",
    )
    threads: Count | None = Field(
        None,
        description="Threads of a CPU's kernels; 1 if left out. A GPU's times do not hang on them",
    )
    clock: Literal["auto", "wall", "cpu"] = Field(
        "auto",
        description="What a CPU's times are read from: wall time, or the CPU seconds of the one thread, which other processes disturb "
        "least; auto: cpu with one thread",
    )
    repeats: Count = Field(
        4, ge=2, description="Runs of a configuration, base beside them; more with a target"
    )
    method: Literal["signature", "group"] = Field(
        "signature", description="Switch all groups of a signature, or one (the paper)"
    )
    limit: Count = Field(
        16,
        ge=8,
        description="Configurations of a signature measured at first: all where it has no more, else each change of one op, "
        "everything in each format, and random ones",
    )
    rounds: Whole = Field(
        3,
        description="Rounds of solving and measuring what was chosen, and of each signature the `more` least certain gains",
    )
    more: Whole = Field(
        8,
        description="Configurations of a signature measured in each round beside what was chosen, while their gains are not known to "
        "± target",
    )
    slice: Count | None = Field(
        None, description="Configurations per task; chosen by what a task costs, if left out"
    )
    bound: Literal["pooled", "median", "lower", "cautious"] = Field(
        "pooled",
        description="What of a gain counts. pooled: what all configurations of a signature say of it together; "
        "median: the gain as measured; lower: its interval's lower end; "
        "cautious: the lower end where the interval includes zero",
    )
    target: Number | None = Field(
        0.01,
        gt=0,
        lt=1,
        description="Repeat until gains are known to ± this share of TTFT; null: do not",
    )
    cap: Count | None = Field(
        None, ge=2, description="Runs at most; 4 x repeats, or 2 x without a target, if left out"
    )
    compile: bool = Field(
        False,
        description="Time what is compiled, base and configurations alike. torch: the model's blocks through torch.compile; vllm: as it is "
        "served by default (on a GPU with CUDA graphs), which takes an engine for each configuration",
    )
    graph: bool = Field(
        True, description="On CUDA, replay captured graphs, so that launches do not hide gains"
    )
    seed: Whole = Field(0, description="Seed of order and tokens")

    @field_validator("bound", mode="before")
    @classmethod
    def _renamed(cls, bound: Any) -> Any:
        if bound == "mean":
            log.warning(
                "timing.bound: mean is called median now, which it always was; "
                "the old name is read in this version only."
            )
            return "median"
        return bound

    @model_validator(mode="after")
    def _one_thread(self) -> TimingSpec:
        if self.clock == "cpu" and (self.threads or 1) > 1:
            raise ValueError(
                f"the CPU seconds of {self.threads} threads are no time to wait for: set clock to wall, or threads to 1"
            )
        return self

    def of(self, workload: WorkloadSpec) -> TimingSpec:
        """As it is for a workload. Raises ValueError where it says another one itself."""
        said = {"length": workload.prompt, "output": workload.output, "batch": workload.batch}
        said = {key: count for key, count in said.items() if count is not None}
        for key, count in said.items():
            if key in self.model_fields_set and getattr(self, key) != count:
                name = "prompt" if key == "length" else key
                raise ValueError(
                    f"workload.{name} is {count}, timing.{key} {getattr(self, key)}: take one of them away"
                )
        return self.model_copy(update=said)

    def threads_on(self, device: str) -> int | None:
        """Threads that times on `device` are measured with; None on a GPU."""
        return (self.threads or 1) if device == "cpu" else None
