"""What an engine asks of a checkpoint: one format for the parts of each fused layer (serving/fused.py)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from mpq.errors import MpqError
from mpq.serving.fused import Fused, layers_of

# whether it fuses layers. SGLang merges the same products as vLLM, by vLLM's names (sglang/srt/models/llama.py: qkv_proj,
# gate_up_proj); TensorRT-LLM refuses two formats in one of them (docs/engines.md); transformers runs each linear by itself, on
# Gaudi too
ENGINES = {
    "vllm": True,
    "sglang": True,
    "tensorrt-llm": True,
    "transformers": False,
    "gaudi": False,
}


def check_engine(engine: str) -> None:
    """Raise MpqError for an engine that is not known."""
    if engine not in ENGINES:
        raise MpqError(f"Unknown engine {engine!r}: expected one of {', '.join(ENGINES)}.")


def split_ties(
    formats: Mapping[str, str], linears: Collection[str], base: str, engine: str
) -> Iterator[tuple[Fused, dict[str, str]]]:
    """Each fused layer of the engine whose parts differ under `formats`, with the parts' formats.

    `linears` are the model's: a part that is not decided stays in `base`, one that the model lacks does not count.
    """
    for layer, ops in layers_of(linears) if ENGINES[engine] else ():
        chosen = {op: formats.get(op, base) for op in ops}
        if len(set(chosen.values())) > 1:
            yield layer, chosen


def fused_together(ops: Collection[str], engine: str) -> list[list[str]]:
    """The ops that the engine multiplies in one product, where there are several of them."""
    return [of for _, of in layers_of(ops)] if ENGINES[engine] else []
