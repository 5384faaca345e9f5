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
from safetensors.torch import load_file, save_file
from small import MIXTURES, small_config, small_model, write_checkpoint
from torch import nn

from mpq.errors import MpqError
from mpq.export.check import Check, compare
from mpq.export.exporting import export
from mpq.export.expressible import lowered_linears, unread_experts
from mpq.export.reload import loaded_model, log_probabilities, rounding_experts
from mpq.export.skeleton import skeleton
from mpq.formats.format import get_format
from mpq.formats.quantize import fake_quantize, share_of
from mpq.formats.scheme import get_scheme
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import fingerprint, load_config
from mpq.models.dense import dense_tensors
from mpq.models.experts import dispatched, products_of
from mpq.models.loading import load_model
from mpq.program.plan import Plan

BLOCKS = Blocks(np.random.default_rng(0).integers(0, 97, (4, 32)))


def plan_of(
    source: Path, experts: Mapping[str, str], linears: str = "int8", base: str = "fp32"
) -> Plan:
    """Experts by the ends of their names, linears of the layers in one format."""
    formats: dict[str, str] = {}
    for name, module in load_model(source, base).named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            formats[name] = linears
        if dispatched(module):
            formats |= {f"{name}.{p}": experts.get(p, base) for p in products_of(module)}
    return Plan(
        strategy="ip_m",
        objective="m",
        tau=0.01,
        base=base,
        formats=formats,
        predicted_loss_mse=1e-4,
        budget=1e-3,
        predicted_gain=1e3,
        mean_square_loss=16.0,
        fingerprint=fingerprint(source),
    )


BOTH = {"gate_up_proj": "fp8_e4m3", "down_proj": "fp8_e4m3"}


def reloaded(
    source: Path, out: Path, lowered: Mapping[str, str], base: str, engine: str
) -> tuple[nn.Module, Check]:
    """The export as transformers loads it, and its loss beside that of mpq's run."""
    model = skeleton(load_config(source))
    formats = lowered_linears(lowered, base, model, engine)
    found = loaded_model(out, base, decode_experts=bool(unread_experts(formats, base, model)))
    with torch.inference_mode(), rounding_experts(found, formats):
        log_p = log_probabilities(found, torch.from_numpy(BLOCKS.tokens)).numpy()
    return found, compare(load_model(source, base), formats, base, BLOCKS, log_p)


@pytest.mark.parametrize(
    ("model_type", "scheme", "base", "engine"),
    [
        ("mixtral", "fp8_e4m3", "fp32", "vllm"),
        ("qwen3_moe", "int8", "fp32", "vllm"),  # decoded for the check: transformers has no reader
        ("deepseek_v3", "int8", "fp32", "transformers"),  # packed, for it reads no other integers
        ("deepseek_v3", "mxfp8", "bf16", "vllm"),
        ("mixtral", "w4a16_g32_mse", "bf16", "transformers"),
        ("qwen3_moe", "mxfp4", "bf16", "vllm"),
        ("mixtral", "nvfp4a16", "bf16", "vllm"),  # gate and up share a scale, an expert at a time
    ],
)
def test_experts_are_reloaded_in_transformers(
    tmp_path: Path, model_type: str, scheme: str, base: str, engine: str
) -> None:
    """Lowered experts beside INT8 linears: each has its codes and scales under the name that it had, found by one pattern; a
    router keeps its name, too. The weights that transformers has of them are the plan's, and so is its loss."""
    more = {**MIXTURES[model_type], "intermediate_size": 64}
    more |= {"moe_intermediate_size": 32} if "moe_intermediate_size" in more else {}
    dtype = getattr(torch, get_format(base).dtype)
    source, out = tmp_path / "model", tmp_path / "out"
    small_model(model_type, dtype=dtype, **more).save_pretrained(source)
    plan = plan_of(source, dict.fromkeys(BOTH, scheme), base=base)
    made = export(plan, source, out, engine=engine)
    assert sum(made.formats.values()) == len(plan.lowered)
    held = set(load_file(out / "model.safetensors"))
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    patterns = [t for g in said["config_groups"].values() for t in g["targets"] if t[:3] == "re:"]
    names = set(load_file(source / "model.safetensors"))
    assert {n for n in names if ".gate." in n} <= held
    each = [n for n in names if re.search(r"experts\.\d+\.", n)]
    assert len(each) == 3 * 4 * (1 if model_type == "deepseek_v3" else 2)
    for name in each:
        assert f"{name}_scale" in held
        assert sum(bool(re.match(p[3:], name.removesuffix(".weight"))) for p in patterns) == 1
    assert any(name.endswith("mlp.gate") for name in said["ignore"])
    model, check = reloaded(source, out, plan.formats, base, engine)
    assert check.passed, check
    for name, module in load_model(source, base).named_modules():
        if dispatched(module):
            for product in products_of(module):
                weights = getattr(module, product)
                want = [fake_quantize(w, get_scheme(scheme).weights, "row") for w in weights]
                assert torch.equal(model.get_parameter(f"{name}.{product}"), torch.stack(want))


@pytest.mark.parametrize(
    ("model_type", "scheme"),
    [("granitemoe", "w4a16_g32"), ("granitemoehybrid", "int8"), ("qwen3_moe", "nvfp4a16")],
)
def test_experts_of_one_tensor_are_written_one_by_one(
    tmp_path: Path, model_type: str, scheme: str
) -> None:
    """A checkpoint that keeps a layer's experts together, gate above up: each has its codes under the name that vLLM has for it,
    which compressed-tensors reads back as the source's rows after their round trip; the reloaded loss is the plan's."""
    source, out = tmp_path / "model", tmp_path / "out"
    more = {**MIXTURES["qwen3_moe"], "num_local_experts": 4, "intermediate_size": 64}
    more |= {"moe_intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if model_type == "granitemoehybrid":
        more |= {"layer_types": ["attention", "mamba"], "mamba_n_heads": 8, "mamba_d_head": 8}
        more |= {"mamba_n_groups": 1, "mamba_d_state": 8}
    model = small_model(model_type, dtype=torch.bfloat16, **more)
    model.save_pretrained(source)
    stacked = {n: t.contiguous() for n, t in model.state_dict().items()}
    if model_type == "qwen3_moe":  # which transformers itself writes one by one
        save_file(stacked, source / "model.safetensors", metadata={"format": "pt"})
    plan = plan_of(source, dict.fromkeys(BOTH, scheme), linears="bf16", base="bf16")
    export(plan, source, out, engine="vllm")
    assert reloaded(source, out, plan.formats, "bf16", "vllm")[1].passed
    found = dense_tensors(out, torch.bfloat16)
    weights = get_scheme(scheme).weights
    for owner, module in model.named_modules():
        if not dispatched(module):
            continue
        for expert in range(4):
            of_both, down = module.gate_up_proj[expert], module.down_proj[expert]
            gate, up = of_both.chunk(
                2
            )  # one scale of the tensor for both, where the format has one
            for part, matrix, scaled in (
                ("gate", gate, of_both),
                ("up", up, of_both),
                ("down", down, down),
            ):
                want = fake_quantize(matrix, weights, "row", share=share_of(scaled, weights))
                assert torch.equal(found[f"{owner}.{expert}.{part}_proj.weight"][...], want)
    if model_type != "qwen3_moe":
        with pytest.raises(MpqError, match="vllm alone reads lowered experts"):
            export(plan, source, tmp_path / "other", engine="transformers")


@pytest.mark.usefixtures("reloaded_here")
def test_a_checked_export_of_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The exporter's own check of NVFP4 passes; gate and up of an expert share a scale, all experts that of
    their input, the largest of what the text makes; which engine has answered one is told."""
    more = {**MIXTURES["qwen3_moe"], "moe_intermediate_size": 32}
    source, out = tmp_path / "model", tmp_path / "out"
    small_model("qwen3_moe", dtype=torch.bfloat16, **more).save_pretrained(source)
    plan = plan_of(source, dict.fromkeys(BOTH, "nvfp4"), base="bf16")
    with pytest.raises(MpqError, match="measured on text"):
        export(plan, source, out)
    with caplog.at_level(logging.WARNING, "mpq"):
        made = export(plan, source, out, check=BLOCKS)
    assert made.check["passed"]
    assert "of engines vLLM alone was seen to answer" in caplog.text
    held = load_file(out / "model.safetensors")
    experts = [f"model.layers.0.mlp.experts.{e}" for e in range(4)]
    for expert in experts:
        gate, up = (held[f"{expert}.{p}_proj.weight_global_scale"] for p in ("gate", "up"))
        assert gate == up
    inputs: list[torch.Tensor] = []
    model = load_model(source, "bf16")
    module = model.get_submodule("model.layers.0.mlp.experts")
    module.register_forward_pre_hook(lambda _, given: inputs.append(given[0].abs().amax()))
    with torch.inference_mode():
        model(torch.from_numpy(BLOCKS.tokens))
    activations = get_scheme("nvfp4").activations
    assert activations is not None
    want = share_of(torch.stack(inputs).amax().float(), activations)
    found = {
        float(held[f"{e}.{p}_proj.input_global_scale"]) for e in experts for p in ("gate", "up")
    }
    assert found == {want}


@pytest.mark.parametrize(
    ("model_type", "experts", "engine", "told"),
    [
        ("qwen3_moe", {"down_proj": "int8"}, "transformers", "all of a model in one of"),
        ("qwen3_moe", dict.fromkeys(BOTH, "fp8_block"), "transformers", "experts for transformers"),
        ("qwen3_moe", {"down_proj": "fp8_e4m3"}, "vllm", "one format for all experts"),
        ("qwen3_moe", dict.fromkeys(BOTH, "mxfp4"), "sglang", "mpq writes experts for sglang in"),
        ("gpt_oss", BOTH, "vllm", "in one tensor"),
    ],
)
def test_experts_that_cannot_be_exported(
    tmp_path: Path, model_type: str, experts: dict[str, str], engine: str, told: str
) -> None:
    """What a target cannot take is one sentence, and nothing is left behind."""
    source = write_checkpoint(tmp_path / "model", model_type=model_type)
    with pytest.raises(MpqError, match=told):
        export(plan_of(source, experts), source, tmp_path / "out", engine=engine)
    assert not (tmp_path / "out").exists()


def test_experts_that_a_plan_does_not_name_are_in_base() -> None:
    """One product of a layer's experts lowered and the other left out is the same as that one in base, and refused as that is."""
    model = skeleton(small_config("qwen3_moe", **MIXTURES["qwen3_moe"]))
    lowered, other = model.expert_ops[:2]
    for formats in ({lowered: "int8"}, {lowered: "int8", other: "bf16"}):
        with pytest.raises(MpqError, match=f"has {lowered} in int8 and {other} in bf16"):
            lowered_linears(formats, "bf16", model, "vllm")


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_in_base_beside_lowered_linears(tmp_path: Path, model_type: str) -> None:
    """Experts one by one or fused that stay in base are listed in `ignore`, and reload as they were."""
    source = write_checkpoint(tmp_path / "model", model_type=model_type)
    plan = plan_of(source, {})
    out = tmp_path / "out"
    export(plan, source, out)
    assert reloaded(source, out, plan.formats, "fp32", "vllm")[1].passed
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert any("experts" in name for name in ignored)
