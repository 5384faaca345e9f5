"""A plan as the settings of Intel Neural Compressor for Gaudi, the paper's tool: which modules it runs in FP8.

There are no weights in it: the tool measures ranges on the device, with `maxabs_measure.json`, and rounds the source checkpoint
there, with `maxabs_quant.json`. Keys and values are those of neural-compressor-pt 3.10 (torch/quantization/config.py: FP8Config),
whose own matching of names the tests ask; modules are called as optimum-habana 1.21 calls them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from mpq.errors import MpqError
from mpq.export.skeleton import Skeleton

# what optimum-habana calls attention's products, each a module of its own
_PRODUCTS = {"qk_matmul": "matmul_qk", "av_matmul": "matmul_av"}
# model types whose attention has these modules there (optimum/habana/transformers/models)
_WITH_PRODUCTS = (
    *("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3"),
    *("gemma3_text", "phi", "starcoder2", "gptj", "deepseek_v2", "deepseek_v3", "gpt_oss"),
)
_FORMAT, _BASE = "fp8_e4m3", "bf16"
_NO_MODULE = "(?!)"  # matches nothing, where an empty list would mean everything
_ENDS = {"MEASURE": "maxabs_measure.json", "QUANTIZE": "maxabs_quant.json"}


def settings(
    formats: Mapping[str, str], base: str, model: Skeleton, model_type: str
) -> dict[str, str]:
    """The settings of a plan (op → format), name of the file → JSON.

    Modules in FP8 are in `allowlist`, so that whatever else Gaudi's model has, its KV cache and fused attention among it, stays
    in base. Raises MpqError for another base than BF16, other formats than FP8-E4M3, and ops that are no modules there.
    """
    if base != _BASE:
        raise MpqError(
            f"Neural Compressor runs FP8 on Gaudi beside {_BASE}, but the plan's base is {base}: make the plan with base {_BASE}."
        )
    lowered = {op: f for op, f in formats.items() if f != base}
    for op, name in lowered.items():
        if name != _FORMAT:
            raise MpqError(
                f"{op} runs in {name} in this plan, which Neural Compressor has no FP8 setting for on Gaudi: make the plan with {_FORMAT} beside {_BASE}."
            )
    names = [_module(op, model, model_type) for op in lowered]
    shared = {
        "method": "HOOKS",
        "observer": "maxabs",
        "fp8_config": "E4M3",
        "hp_dtype": _BASE,
        # regular expressions that are searched for in the names of modules: the end keeps gate_proj apart from gate
        "allowlist": {"types": [], "names": [f"{name}$" for name in names] or [_NO_MODULE]},
        "blocklist": {"types": [], "names": []},
        "dump_stats_path": "./hqt_output/measure",
    }
    scale = {"QUANTIZE": {"scale_method": "maxabs_hw"}}
    return {
        file: json.dumps({"mode": mode, **scale.get(mode, {}), **shared}, indent=2)
        for mode, file in _ENDS.items()
    }


def _module(op: str, model: Skeleton, model_type: str) -> str:
    """What an op is called in Gaudi's model."""
    attention, _, product = op.rpartition(".")
    if product in _PRODUCTS:
        if model_type not in _WITH_PRODUCTS:
            raise MpqError(
                f"The plan lowers {op}, but optimum-habana has no module for it in {model_type}: pin *.qk_matmul and *.av_matmul to base and solve again."
            )
        return f"{attention}.{_PRODUCTS[product]}"
    if op not in model.plain:
        raise MpqError(
            f"The plan lowers {op}, which is no nn.Linear and which Neural Compressor has no setting for: pin it to base and solve again."
        )
    return op
