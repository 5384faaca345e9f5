"""Linears that an engine multiplies in one product, so that they must have one format.

vLLM takes the first part's format for all of a fused layer and compares no further: q and v in INT8 beside k in FP8
loads, answers, and is wrong (docs/engines.md). The program ties the parts, and an export compares them once more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Fused:
    """Linears with one parent that an engine multiplies as `into`; `source` is where the engine says so."""

    label: str
    parts: tuple[str, ...]
    into: str
    source: str


_MODELS = "vllm/model_executor/models/"
_LLAMA = _MODELS + "llama.py: LlamaForCausalLM.packed_modules_mapping; so named in most"
FUSED = (
    Fused("q k v", ("q_proj", "k_proj", "v_proj"), "qkv_proj", _LLAMA),
    Fused("gate up", ("gate_proj", "up_proj"), "gate_up_proj", _LLAMA),
    Fused(
        "q_a kv_a",
        ("q_a_proj", "kv_a_proj_with_mqa"),
        "fused_qkv_a_proj",
        _MODELS + "deepseek_v2.py: DeepseekV2MLAAttention.fused_qkv_a_proj",
    ),
    Fused(
        "query key value",
        ("query", "key", "value"),
        "qkv_proj",
        _MODELS + "bert.py: BertSelfAttention.qkv_proj; so named in encoders",
    ),
    Fused("w1 w3", ("w1", "w3"), "w13", _MODELS + "lfm2.py, internlm2.py: MLP"),
    Fused("c_fc", ("c_fc_0", "c_fc_1"), "gate_up_proj", _MODELS + "exaone.py: ExaoneGatedMLP"),
)
# where w1 has no w3 beside it; no pattern over names says that, so the program has no tie for it and an export refuses
WITHOUT_W3 = Fused("w2 w1", ("w2", "w1"), "gate_up_proj", _MODELS + "qwen.py: QWenMLP")


def layers_of(linears: Collection[str]) -> Iterator[tuple[Fused, list[str]]]:
    """Each fused layer that a model with these linears has, and its parts, two or more."""
    parents: dict[str, set[str]] = {}
    for op in linears:
        parent, _, child = op.rpartition(".")
        parents.setdefault(parent, set()).add(child)
    for parent, children in parents.items():
        of = FUSED if "w3" in children else (*FUSED, WITHOUT_W3)
        for layer in of:
            ops = [f"{parent}.{part}".lstrip(".") for part in layer.parts if part in children]
            if len(ops) > 1:
                yield layer, ops
