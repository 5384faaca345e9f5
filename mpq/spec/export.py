"""The checkpoint that a run ends with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mpq.spec.fields import Strict, Url

SERVED = ("vllm", "sglang", "transformers")  # engines that read compressed-tensors
SERVED_MODELOPT = ("vllm", "sglang", "tensorrt-llm")  # engines that read ModelOpt's checkpoints


class ExportSpec(Strict):
    """A plan as a checkpoint that an engine serves, reloaded in transformers and compared; see docs/engines.md."""

    to: Literal["compressed-tensors", "modelopt", "json"] = Field(
        "compressed-tensors",
        description="compressed-tensors: a checkpoint for the engine; modelopt: one in NVIDIA's form, for vllm, sglang or tensorrt-llm; json: ops and formats",
    )
    out: Url | None = Field(
        None,
        description="Folder or fsspec URL to write, which appears when it is whole; `checkpoint` in the run's own folder if left out. "
        "A run for another checkpoint (watch) writes to a folder below it",
    )
    plan: str | None = Field(
        None,
        min_length=1,
        description="The plan's name, such as et-ip_et-tau0.002; the plan to run, as the report has it, if left out",
    )
    overwrite: bool = Field(
        False,
        description="Replace an earlier export in `out`; in the run's own folder that is so without it",
    )
