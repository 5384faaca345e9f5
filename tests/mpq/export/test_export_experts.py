"""Mixtures of experts exported to compressed-tensors: each expert under its own name, and what transformers makes of it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import write_checkpoint
from torch import nn

from mpq.errors import MpqError
from mpq.export.check import compare
from mpq.export.exporting import export
from mpq.export.reload import loaded_model, log_probabilities
from mpq.formats.format import get_format
from mpq.formats.quantize import quantize, scale_of
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import fingerprint, load_model
from mpq.models.experts import dispatched, products_of
from mpq.program.plan import Plan

BLOCKS = Blocks(np.random.default_rng(0).integers(0, 97, (4, 32)))


def plan_of(source: Path, experts: Mapping[str, str], linears: str = "int8") -> Plan:
    """Experts by the ends of their names, linears of the layers in one format."""
    formats: dict[str, str] = {}
    for name, module in load_model(source, "fp32").named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            formats[name] = linears
        if dispatched(module):
            formats |= {f"{name}.{p}": experts.get(p, "fp32") for p in products_of(module)}
    return Plan(
        strategy="ip_m",
        objective="m",
        tau=0.01,
        base="fp32",
        formats=formats,
        predicted_loss_mse=1e-4,
        budget=1e-3,
        predicted_gain=1e3,
        mean_square_loss=16.0,
        fingerprint=fingerprint(source),
    )


BOTH = {"gate_up_proj": "fp8_e4m3", "down_proj": "fp8_e4m3"}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_are_reloaded_in_transformers(tmp_path: Path, model_type: str) -> None:
    """FP8 experts beside INT8 linears: each expert's codes are in the file under the name that it had, the weights that
    transformers makes of them are the plan's, and so is its loss."""
    source = write_checkpoint(tmp_path / "model", model_type=model_type)
    plan = plan_of(source, BOTH)
    out = tmp_path / "out"
    made = export(plan, source, out)
    assert made.formats["fp8_e4m3"] == sum(".experts." in op for op in plan.formats)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    fmt, rounded = get_format("fp8_e4m3"), 0
    targets = json.loads((out / "config.json").read_text())["quantization_config"]
    patterns = [
        t for g in targets["config_groups"].values() for t in g["targets"] if t[:3] == "re:"
    ]
    for name, weight in before.items():
        if ".experts." in name and re.search(r"\.\d+\.\w+\.weight$", name):
            scale = scale_of(weight, fmt, "row")
            assert torch.equal(after[f"{name}_scale"], scale)
            assert torch.equal(after[name].float(), quantize(weight, fmt, scale).float())
            module = name.removesuffix(".weight")
            assert sum(bool(re.match(p[3:], module)) for p in patterns) == 1
            rounded += 1
    assert rounded == 3 * 4 * (1 if model_type == "deepseek_v3" else 2)
    assert any(name.endswith("mlp.gate") for name in targets["ignore"])
    model = loaded_model(out, "fp32")
    with torch.inference_mode():
        found = log_probabilities(model, torch.from_numpy(BLOCKS.tokens)).numpy()
    check = compare(load_model(source, "fp32"), plan.lowered, "fp32", BLOCKS, found)
    assert check.passed, check
    for name, module in load_model(source, "fp32").named_modules():
        if dispatched(module):
            weight = module.down_proj
            scale = scale_of(weight, fmt, "row")
            lowered = quantize(weight, fmt, scale).float() * scale
            assert torch.equal(model.get_parameter(f"{name}.down_proj"), lowered)


def test_a_checked_export_of_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The exporter's own check, by a fresh process, passes; that no engine has answered one is told."""
    source = write_checkpoint(tmp_path / "model", model_type="qwen3_moe")
    with caplog.at_level(logging.WARNING, "mpq"):
        made = export(plan_of(source, BOTH), source, tmp_path / "out", check=BLOCKS)
    assert made.check["passed"]
    assert "no engine was seen to answer such an export" in caplog.text


@pytest.mark.parametrize(
    ("model_type", "experts", "engine", "check", "told"),
    [
        ("qwen3_moe", dict.fromkeys(BOTH, "int8"), "vllm", True, "cannot be checked"),
        ("qwen3_moe", dict.fromkeys(BOTH, "int8"), "transformers", False, "in fp8_e4m3 alone"),
        ("qwen3_moe", {"down_proj": "fp8_e4m3"}, "vllm", False, "one format for all experts"),
        ("qwen3_moe", dict.fromkeys(BOTH, "fp8_e5m2"), "vllm", False, "int8 or fp8_e4m3 alone"),
        ("gpt_oss", BOTH, "vllm", False, "in one tensor"),
    ],
)
def test_experts_that_cannot_be_exported(
    tmp_path: Path, model_type: str, experts: dict[str, str], engine: str, check: bool, told: str
) -> None:
    """What a target cannot take is one sentence, and nothing is left behind."""
    source = write_checkpoint(tmp_path / "model", model_type=model_type)
    how = {"engine": engine, "check": BLOCKS if check else None}
    with pytest.raises(MpqError, match=told):
        export(plan_of(source, experts), source, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_in_base_beside_lowered_linears(tmp_path: Path, model_type: str) -> None:
    """Experts one by one or fused that stay in base are listed in `ignore`, and reload as they were."""
    source = write_checkpoint(tmp_path / "model", model_type=model_type)
    plan = plan_of(source, {})
    out = tmp_path / "out"
    export(plan, source, out)
    model = loaded_model(out, "fp32")
    with torch.inference_mode():
        found = log_probabilities(model, torch.from_numpy(BLOCKS.tokens)).numpy()
    assert compare(load_model(source, "fp32"), plan.lowered, "fp32", BLOCKS, found).passed
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert any("experts" in name for name in ignored)
