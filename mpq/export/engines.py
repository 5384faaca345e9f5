"""Engines as data: which linears each multiplies in one product, so that they must have one format.

vLLM takes the first part's format for all of a fused layer and compares no further: q and v in INT8 beside k in FP8
loads, answers, and is wrong (docs/engines.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Fused:
    """Linears with one parent that an engine multiplies as `into`; `source` is where the engine says so."""

    parts: tuple[str, ...]
    into: str
    source: str


@dataclass(frozen=True)
class Engine:
    """What an engine asks of a checkpoint: one format for the parts of each fused layer."""

    name: str
    fused: tuple[Fused, ...]


_MODELS = "vllm/model_executor/models/"
_FUSED = (
    Fused(
        ("q_proj", "k_proj", "v_proj"),
        "qkv_proj",
        _MODELS + "llama.py: LlamaForCausalLM.packed_modules_mapping; so named in most",
    ),
    Fused(
        ("gate_proj", "up_proj"),
        "gate_up_proj",
        _MODELS + "llama.py: LlamaForCausalLM.packed_modules_mapping; so named in most",
    ),
    Fused(
        ("q_a_proj", "kv_a_proj_with_mqa"),
        "fused_qkv_a_proj",
        _MODELS + "deepseek_v2.py: DeepseekV2MLAAttention.fused_qkv_a_proj",
    ),
    Fused(
        ("query", "key", "value"),
        "qkv_proj",
        _MODELS + "bert.py: BertSelfAttention.qkv_proj; so named in encoders",
    ),
    Fused(("w1", "w3"), "gate_up_proj", _MODELS + "internlm2.py: InternLM2MLP"),
    Fused(("w2", "w1"), "gate_up_proj", _MODELS + "qwen.py: QWenMLP"),
    Fused(("c_fc_0", "c_fc_1"), "gate_up_proj", _MODELS + "exaone.py: ExaoneGatedMLP"),
)
ENGINES: dict[str, Engine] = {
    e.name: e
    for e in (
        Engine("vllm", _FUSED),
        # SGLang merges the same products, as vLLM names them (sglang/srt/models/llama.py: qkv_proj, gate_up_proj)
        Engine("sglang", _FUSED),
        # TensorRT-LLM refuses two formats in one fused layer (docs/engines.md)
        Engine("tensorrt-llm", _FUSED),
        # transformers runs each linear by itself
        Engine("transformers", ()),
    )
}


def split_ties(
    formats: Mapping[str, str], linears: Collection[str], base: str, engine: str
) -> Iterator[tuple[Fused, dict[str, str]]]:
    """Each fused layer of the engine whose parts differ under `formats`, with the parts' formats.

    `linears` are the model's: a part that is not decided stays in `base`, one that the model lacks does not count.
    """
    parents: dict[str, set[str]] = {}
    for op in linears:
        parent, _, child = op.rpartition(".")
        parents.setdefault(parent, set()).add(child)
    for parent, children in parents.items():
        for layer in ENGINES[engine].fused:
            ops = [f"{parent}.{part}".lstrip(".") for part in layer.parts if part in children]
            chosen = {op: formats.get(op, base) for op in ops}
            if len(ops) > 1 and len(set(chosen.values())) > 1:
                yield layer, chosen


def fused_together(ops: Collection[str], engine: str) -> list[list[str]]:
    """The ops that the engine multiplies in one product, where there are several of them."""
    found = []
    for parent in {op.rpartition(".")[0] for op in ops}:
        for layer in ENGINES[engine].fused:
            of = [op for part in layer.parts if (op := f"{parent}.{part}".lstrip(".")) in ops]
            found += [of] if len(of) > 1 else []
    return found
