"""Exports of models whose linears transformers calls otherwise than their checkpoints: engines know the checkpoint's names alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small_export import plan_of
from walk import model_of, tiny

from mpq.export.check import compare
from mpq.export.exporting import export
from mpq.export.modelopt import quantization
from mpq.export.reload import differing, loaded_model, log_probabilities
from mpq.export.scheme import expert_pattern
from mpq.export.skeleton import skeleton
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import load_config
from mpq.models.loading import load_model

BLOCKS = Blocks(np.random.default_rng(0).integers(5, 97, (4, 16)))
#: what a checkpoint calls the shared expert of a layer
SHARED = {"laguna": "shared_expert", "hy_v3": "shared_mlp"}


def tensors_in(folder: Path) -> dict[str, tuple[str, str]]:
    """Name → the file and the tensor."""
    with safe_open(folder / "model.safetensors", "pt") as held:
        return {name: ("model.safetensors", name) for name in held.keys()}  # noqa: SIM118


@pytest.mark.parametrize("model_type", list(SHARED))
def test_linears_keep_the_checkpoints_names(tmp_path: Path, model_type: str) -> None:
    """Every tensor has the name that the source has, or its scales beside it; config.json names such linears as the checkpoint
    and as transformers do, which reloads the plan's codes and loss."""
    source, out = tmp_path / "model", tmp_path / "out"
    model_of(tiny(model_type)).save_pretrained(source)
    of = skeleton(load_config(source))
    formats = {op: "int8" for op in of.plain if ".layers." in op and "down_proj" not in op}
    export(plan_of(source, formats), source, out)
    names = tensors_in(source)
    assert {name.removesuffix("_scale") for name in tensors_in(out)} == set(names)
    own = f"model.layers.1.mlp.{SHARED[model_type]}."
    assert f"{own}gate_proj.weight_scale" in tensors_in(out)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    targets = [target for group in said["config_groups"].values() for target in group["targets"]]
    for shared in (own, "model.layers.1.mlp.shared_experts."):
        assert {f"{shared}gate_proj", f"{shared}up_proj"} <= set(targets)
        assert f"{shared}down_proj" in said["ignore"]
    model = loaded_model(out, "fp32")
    held = {of.name_of(n).removesuffix(".weight"): at for n, at in names.items()}
    linears = {op: held[op] for op in of.plain if op in held}
    assert len(linears) >= len(formats)
    assert differing(model, source, linears, formats, "fp32") == []
    with torch.inference_mode():
        found = log_probabilities(model, torch.from_numpy(BLOCKS.tokens)).numpy()
    assert compare(load_model(source, "fp32"), formats, "fp32", BLOCKS, found).passed
    fp8 = dict.fromkeys(formats, "fp8_e4m3")  # which ModelOpt's form holds
    kept = quantization(fp8, skeleton(load_config(source), list(names)))["quantization"]
    assert f"{own}down_proj" in kept["exclude_modules"]


def test_a_name_whose_scales_transformers_would_lose_is_its_own() -> None:
    """DeepSeek-V4's checkpoints call the head `head`, which transformers renames with `.weight` at its end alone: lowered it is
    `lm_head`, and all else is as they have it."""
    shared, head = "layers.0.ffn.shared_experts.w1", "head"
    model = skeleton(tiny("deepseek_v4"), [f"{shared}.weight", f"{head}.weight", "embed.weight"])
    assert model.coded("lm_head") == "lm_head"
    assert model.names_in_file("lm_head") == ("head", "lm_head")
    assert model.written("head.weight") == "head.weight"
    assert model.written("embed.weight") == "embed.weight" != model.name_of("embed.weight")
    assert model.coded("model.layers.0.mlp.shared_experts.gate_proj") == shared


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
def test_patterns_find_experts_below_whatever_holds_the_layers(prefix: str) -> None:
    """Engines order the modules above a multimodal model's layers otherwise; another layer, or a head of several tokens, is not meant."""
    pattern = expert_pattern("model.language_model.layers.1.mlp.experts.down_proj")[3:]
    assert re.match(pattern, f"{prefix}layers.1.mlp.experts.7.down_proj")
    for other in (f"{prefix}layers.11", f"{prefix}layers.0", "mtp.layers.1"):
        assert not re.match(pattern, f"{other}.mlp.experts.7.down_proj")
