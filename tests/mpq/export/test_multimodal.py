"""Multimodal checkpoints: their language model is calibrated with text, all else stays as it is, and is in the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from small import SMALL
from small_export import plan_of
from transformers import AutoConfig, AutoModelForMultimodalLM

from mpq.export.check import compare
from mpq.export.exporting import export
from mpq.export.reload import loaded_model, log_probabilities, rounding_experts
from mpq.formats.quantize import fake_quantize
from mpq.formats.scheme import get_scheme
from mpq.method import best_plan, gains_of, groups_of, sensitivity_of
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import load_config
from mpq.models.dense import dense_tensors
from mpq.models.loading import load_model

BLOCKS = Blocks(np.random.default_rng(0).integers(5, 90, (4, 24)))
_TEXT = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "patch_size": 14}
_VISION |= {"num_hidden_layers": 1, "image_size": 28}
_QWEN = {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 14}
_ROTATED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_OF_LLAMA = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": _TEXT, "vision_config": _VISION, "mm_tokens_per_image": 4},
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_parameters": _ROTATED},
        "vision_config": {**_QWEN, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
    },
    "llama4": {
        "text_config": {
            **{**_TEXT, "intermediate_size_mlp": 48, "num_experts_per_tok": 1},
            **{"num_local_experts": 4, "interleave_moe_layer_step": 1},
        },
        "vision_config": {**_VISION, **_OF_LLAMA, "pixel_shuffle_ratio": 0.5},
    },
}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_multimodal_checkpoint(tmp_path: Path, model_type: str) -> None:
    """From text to a plan of the language model's linears to an export that transformers loads with its vision tower, whatever
    name the checkpoint has for each part; Llama 4's experts, one tensor before, are a linear each."""
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(
        AutoConfig.for_model(model_type, **CONFIGS[model_type])
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    source, out = tmp_path / "model", tmp_path / "out"
    model.save_pretrained(source)
    loaded = load_model(source, "fp32")
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    groups = groups_of(load_config(source), 1, 24)
    linears = groups.filter(pl.col("kind") == "linear")
    assert len(linears) == 15
    assert not any("vision" in op or "visual" in op for op in groups["op"])
    sensitivity, loss = sensitivity_of(loaded, linears, BLOCKS, ["int8"], "fp32", batch=4)
    assert sensitivity.filter(pl.col("noise_model") == "actual", pl.col("format") == "int8")[
        "kl"
    ].min()
    gains = gains_of("m", linears, sensitivity, ["int8"], "fp32")
    chosen = best_plan(linears, gains, loss, 10.0, "fp32").formats
    chosen = {op: f for op, f in chosen.items() if not op.endswith("lm_head")}  # Gemma's is tied
    assert set(chosen.values()) == {"int8"}
    plan = plan_of(source, chosen)
    export(plan, source, out)
    found = loaded_model(out, "fp32")
    with torch.inference_mode():
        log_p = log_probabilities(found, torch.from_numpy(BLOCKS.tokens)).numpy()
    check = compare(loaded, plan.lowered, "fp32", BLOCKS, log_p)
    assert check.passed, check
    assert check.kl_base_reloaded > 1e-5
    held, fused = dict(found.named_parameters()), 0
    for name, weight in loaded.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            gates = [f"{name.removesuffix('gate_up_proj')}{e}.gate_proj.weight" for e in range(4)]
            assert torch.equal(weight[:, :, :48], torch.stack([held[g].T for g in gates]))
            fused += 1
        elif name.removesuffix(".weight") not in plan.lowered and "experts" not in name:
            assert torch.equal(held[name], weight), name
    assert fused == (2 if model_type == "llama4" else 0)


@pytest.mark.parametrize("turned", [True, False])
def test_experts_of_qwen3_vl_are_written_one_by_one(tmp_path: Path, turned: bool) -> None:
    """Its checkpoints keep a layer's experts in one tensor, (experts, K, C), or as transformers does, (experts, C, K): either way
    each expert's matrices are written as its rows, by the checkpoint's names, and the run of them is the plan's."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    of_qwen = {**_QWEN, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    how = {"text_config": {**_TEXT, **experts, "rope_parameters": _ROTATED}}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_vl_moe", **how, vision_config=of_qwen)
    model = AutoModelForMultimodalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    source, out = tmp_path / "model", tmp_path / "out"
    model.save_pretrained(source)
    stored = dict(model.state_dict())
    of_experts = [n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    weights = {n: stored[n].clone() for n in of_experts}
    stored |= {n: (w.mT if turned else w).contiguous() for n, w in weights.items()}
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    plan = plan_of(source, dict.fromkeys(of_experts, "int8"))
    export(plan, source, out, engine="vllm")
    held = dense_tensors(out)
    int8 = get_scheme("int8").weights
    for op, weight in weights.items():
        owner, _, product = op.rpartition(".")
        parts = ("gate_proj", "up_proj") if product == "gate_up_proj" else (product,)
        for expert, whole in enumerate(weight):
            for part, matrix in zip(parts, whole.chunk(len(parts)), strict=True):
                found = held[f"{owner}.{expert}.{part}.weight"][...]
                assert torch.equal(found, fake_quantize(matrix, int8, "row"))
    found = loaded_model(out, "fp32", decode_experts=True)
    with torch.inference_mode(), rounding_experts(found, plan.lowered):
        log_p = log_probabilities(found, torch.from_numpy(BLOCKS.tokens)).numpy()
    check = compare(load_model(source, "fp32"), plan.lowered, "fp32", BLOCKS, log_p)
    assert check.passed, check
