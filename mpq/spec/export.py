"""The checkpoint that a run ends with."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from mpq.spec.fields import Strict, Url

Target: TypeAlias = Literal[
    "compressed-tensors", "modelopt", "torchao", "mxfp4", "neural-compressor", "json"
]
# who reads what is written, the one that is meant where none is named first; JSON is for anybody
READERS: dict[Target, tuple[str, ...]] = {
    "compressed-tensors": ("vllm", "sglang", "transformers"),
    "modelopt": ("vllm", "sglang", "tensorrt-llm"),
    "torchao": ("transformers",),
    "mxfp4": ("vllm", "transformers"),
    "neural-compressor": ("gaudi",),
    "json": (),
}
# what the check of a checkpoint reads it with, where that is installed by an extra alone (errors.py)
NEEDS = {"compressed-tensors": "compressed_tensors", "torchao": "torchao"}


class ExportSpec(Strict):
    """A plan as a checkpoint that an engine serves, reloaded in transformers and compared; see docs/engines.md."""

    to: Target = Field(
        "compressed-tensors",
        description="compressed-tensors: a checkpoint for the engine; modelopt: one in NVIDIA's form, for vllm, sglang or tensorrt-llm; "
        "torchao: one for transformers; mxfp4: gpt-oss's own form, experts in MXFP4; neural-compressor: its settings for Gaudi, no weights; json: ops and formats",
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
