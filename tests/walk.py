"""Every causal language model of the installed transformers, each made tiny from its own configuration class.

`python tests/walk.py [MODEL_TYPE ...]` prints a JSON line for each: what mpq makes of it.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpq.errors import MpqError
from mpq.loss.sensitivity import measure_sensitivity
from mpq.loss.taps import Tally, tapped
from mpq.models.blocks import Blocks
from mpq.models.graph import trace
from mpq.models.linears import is_linear
from mpq.models.partition import partition
from mpq.running.apply import apply_plan

LENGTH = 16
# what is small, by the names that configurations give it
TINY: dict[str, object] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"), 97),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "d_ff",
            "ffn_hidden_size",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "dense_intermediate_size",
            "intermediate_size_mlp",
        ),
        48,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_decoder_layers",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(
        (
            "num_local_experts",
            "num_experts",
            "n_routed_experts",
            "moe_num_experts",
            "num_moe_experts",
        ),
        4,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
        ),
        24,
    ),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(
        ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8
    ),
    **dict.fromkeys(
        (
            "swa_head_dim",
            "linear_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "dim_head",
            "hc_lowrank",
        ),
        8,
    ),
    **dict.fromkeys(("dff", "dim_ff"), 48),
    **dict.fromkeys(
        (
            "encoder_hash_byte_group_vocab",
            "pronunciation_vocab_size",
            "shape_vocab_size",
            "unpadded_vocab_size",
            "ngram_vocab_size_base",
        ),
        97,
    ),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    "is_decoder": True,
    "qk_head_dim": 16,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
_TWO_KINDS = ["sliding_attention", "full_attention"]
# what an architecture needs beside TINY
MORE: dict[str, dict[str, object]] = {
    "bamba": {**_HYBRID, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": {"n_group": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    **dict.fromkeys(
        ("dots3_note", "dots3_note_text"),
        {
            f"swa_{name}": TINY[name]
            for name in (
                "num_attention_heads",
                "num_key_value_heads",
                "q_lora_rank",
                "kv_lora_rank",
                "head_dim",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
            )
        }
        | {"swa_num_key_value_heads": 4},
    ),
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "layer_types": _TWO_KINDS,
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [48, 48],
    },
    **{
        key: {"global_head_dim": 8, "layer_types": _TWO_KINDS, "hidden_size_per_layer_input": 8}
        for key in ("gemma4_text", "gemma4_unified_text")
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_HYBRID, "layer_types": ["mamba", "attention"]},
    **{key: {"head_dim": 8} for key in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 8)},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "mamba_d_state": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny(model_type: str, more: dict[str, object] | None = None) -> Any:
    """The architecture's own configuration with what is known to be a size made small, text parts of it too."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**{**_small(cls, cls()), **MORE.get(model_type, {}), **(more or {})})


def _small(cls: Any, config: Any) -> dict[str, object]:
    there = set(config.to_dict()) | set(config.attribute_map)
    found: dict[str, object] = {
        key: value for key, value in TINY.items() if key in there and _said(config, key) is not None
    }
    if "kv_lora_rank" in found:  # latent attention has no heads that are shared
        found["num_key_value_heads"] = 4
    for key in getattr(cls, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None and hasattr(part, "to_dict"):
            found[key] = _small(type(part), part)
    return found


def _said(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except RuntimeError:  # some say a size for each layer
        return config.to_dict().get(key)


def model_of(config: Any) -> nn.Module:
    """The model with weights by which its logits differ, and no dropout."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config)).float().eval()
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.1)
    return model


def walk(model_type: str, more: dict[str, object] | None = None) -> dict[str, Any]:
    """What mpq makes of a tiny model of the architecture: counts of ops by kind, and `fails`, a reason or ""."""
    told: dict[str, Any] = {"model_type": model_type, "fails": "", "stage": "configuration"}
    try:
        config = tiny(model_type, more)
        model = model_of(config)
        ids = torch.randint(5, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        called: dict[str, int] = {}
        hooks = [
            m.register_forward_pre_hook(lambda *_, n=n: called.update({n: called.get(n, 0) + 1}))
            for n, m in model.named_modules()
            if is_linear(m)
        ]
        told["stage"] = "base"
        with torch.inference_mode():
            before = model(input_ids=ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        if not torch.isfinite(before).all():
            raise ValueError("base logits are not finite")
        told["stage"] = "partition"
        ops = [op for g in partition(trace(config, length=LENGTH)) for op in g.ops]
        kinds = {op.name: op.kind for op in ops}
        told["kinds"] = {k: list(kinds.values()).count(k) for k in dict.fromkeys(kinds.values())}
        told["other"] = sorted(
            {name.split(".layers.")[-1] for name, k in kinds.items() if k == "other"}
        )[:6]
        heads = {name.rpartition(".call")[0] for name in kinds if ".call" in name} | set(kinds)
        unnamed = sorted(set(called) - heads)
        told["idle"] = [] if _matter(model, ids, unnamed, before) else unnamed
        if unnamed and not told["idle"]:
            raise ValueError(f"{len(unnamed)} linears that run are not named: {unnamed[0]}")
        lowered = {name: "int8" for name, kind in kinds.items() if kind != "other"}
        if not lowered:
            raise ValueError("nothing can be lowered")
        told["stage"] = "taps"
        pairs = [(name, kinds[name]) for name in lowered]
        with tapped(model, pairs, Tally([])):
            under = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(under, before, rtol=1e-4, atol=1e-4)
        told["stage"] = "sensitivity"
        blocks = Blocks(ids.numpy())
        frame, _ = measure_sensitivity(
            model, pairs, blocks, formats=["int8"], base="fp32", measures=("loss",)
        )
        if set(frame["op"]) != set(lowered):
            missing = sorted(set(lowered) - set(frame["op"]))
            raise ValueError(f"{len(missing)} ops have no sensitivity: {missing[0]}")
        told["stage"] = "apply"
        with torch.inference_mode():
            with apply_plan(model, lowered, base="fp32", seed=0):
                inside = model(input_ids=ids, use_cache=False).logits
            after = model(input_ids=ids, use_cache=False).logits
        if torch.equal(inside, before):
            raise ValueError("lowered, it computes what it did")
        if not torch.equal(after, before):
            raise ValueError("taken off, it computes something else")
        told["stage"] = "done"
    except Exception as error:  # whatever an architecture's own code raises
        message = next(iter(str(error).strip().splitlines()), "")
        told["fails"] = (
            f"{type(error).__name__}: {message}"[:300]
            if not isinstance(error, MpqError)
            else message
        )
    return told


@torch.inference_mode()
def _matter(model: nn.Module, ids: Tensor, linears: list[str], before: Tensor) -> bool:
    """Whether the logits change when these linears give something else."""
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out: out * 0.5 + 0.3)
        for name in linears
    ]
    try:
        return not torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    finally:
        for hook in hooks:
            hook.remove()


def all_types() -> list[str]:
    """The model types for which transformers has a causal language model."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING))


if __name__ == "__main__":
    for name in sys.argv[1:] or all_types():
        start = time.process_time()
        found = walk(name)
        print(json.dumps(found | {"cpu_s": round(time.process_time() - start, 2)}), flush=True)
