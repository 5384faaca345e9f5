"""A whole run of a mixture of experts, and the method's steps on others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import MIXTURES, short, small_model, small_spec, write_checkpoint

from mpq.errors import MpqError
from mpq.flows.calibrate import calibrate
from mpq.program.plan import Plan
from mpq.report.runs import join_tables
from mpq.spec import RunSpec, parse_spec
from mpq.tasks.stage import read, read_json


def to_be_served(folder: Path, model_type: str, **more: object) -> RunSpec:
    """The short run of a tiny mixture, by memory in INT8 under a bound that nothing breaks, which ends with a checkpoint."""
    data: dict[str, Any] = short(small_spec(folder)).model_dump(mode="json")
    data["model"]["path"] = str(write_checkpoint(folder / "mixture", model_type=model_type))
    data["objectives"]["m"]["formats"] = ["int8"]
    return parse_spec({**data, "engine": "vllm", "export": {}, "taus": [10.0], **more})


def in_its_own_form(folder: Path, pin: dict[str, str] | None = None) -> RunSpec:
    """The same of a gpt-oss with its experts in MXFP4, rows in whole blocks, in base BF16, exported as OpenAI's are."""
    pin = pin or {"*.experts.*": "mxfp4a16", "*.self_attn.*": "base"}
    data = to_be_served(folder, "gpt_oss").model_dump(mode="json")
    more = {**MIXTURES["gpt_oss"], "intermediate_size": 32}
    small_model("gpt_oss", dtype=torch.bfloat16, **more).save_pretrained(data["model"]["path"])
    data["model"]["base"] = "bf16"
    data["objectives"]["m"]["formats"] = ["mxfp4a16"]
    return parse_spec({**data, "constraints": {"pin": pin}, "export": {"to": "mxfp4"}})


@pytest.mark.usefixtures("reloaded_here")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_mixture_ends_with_a_checkpoint(tmp_path: Path, model_type: str) -> None:
    """From the checkpoint to one that is reloaded in transformers: everything that vLLM takes is lowered, in gpt-oss's own form its
    experts alone; the loss is that of mpq's run, its KL at least what was predicted of it."""
    own = model_type == "gpt_oss"
    spec = in_its_own_form(tmp_path) if own else to_be_served(tmp_path, model_type)
    result = calibrate(spec)
    out = Path(result["out"]["checkpoint"])
    check = json.loads((out / "export.json").read_text())["check"]
    plan = Plan.from_json((out / "plan.json").read_text())
    assert check["passed"], check
    lowered = {op.rpartition(".")[2] for op in plan.lowered}
    assert {"down_proj", "gate_up_proj"} <= lowered
    assert ("o_proj" in lowered) == (not own)
    assert plan.predicted_kl
    assert min(check["kl_base_plan"], check["kl_base_reloaded"]) > 0.5 * plan.predicted_kl


def test_experts_in_one_tensor_are_told_first(tmp_path: Path) -> None:
    """A gpt-oss whose run could choose what its checkpoint has no names for, or one layer's experts where its form has all, ends
    before anything is measured."""
    with pytest.raises(MpqError, match=r"in one tensor.* pin \*\.experts\.\* to base"):
        calibrate(to_be_served(tmp_path, "gpt_oss"))
    with pytest.raises(MpqError, match=r"experts of all layers.* pin \*\.experts\.\* to mxfp4a16"):
        calibrate(in_its_own_form(tmp_path, {"*.self_attn.*": "base"}))


@pytest.mark.usefixtures("reloaded_here")
def test_a_run_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    """Experts published in FP8 are planned for, and exported, as values; plan and report say for how many ops base is no better
    than FP8."""
    spec = to_be_served(tmp_path, "mixtral")
    source = Path(spec.model.path)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = (tensors[name] * 4).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.tensor(0.25)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (source / "config.json").write_text(json.dumps(config))
    result = calibrate(spec)
    plan = Plan.from_json(Path(result["out"]["plan"]).read_text())
    record = json.loads(Path(result["out"]["checkpoint"], "export.json").read_text())
    assert record["check"]["passed"]
    stored = plan.provenance["stored"]
    assert set(stored) == {op for op in plan.formats if ".experts." in op}
    assert set(stored.values()) == {"fp8_e4m3"}
    assert "4 ops in fp8_e4m3: base is no better" in Path(result["out"]["report"]).read_text()


@pytest.mark.usefixtures("reloaded_here")
def test_a_run_of_a_mixture(tmp_path: Path) -> None:
    """A Mixtral for vLLM, from its checkpoint to the report and a checkpoint: experts are measured, timed, chosen alike in a
    layer, evaluated; the router stays in base."""
    data = small_spec(tmp_path).model_dump(mode="json")
    data["model"]["path"] = str(write_checkpoint(tmp_path / "mixture", model_type="mixtral"))
    int8 = {"formats": ["int8"], "strategies": ["ip", "uniform"]}
    spec = parse_spec(
        {**data, "objectives": {"et": int8, "m": int8}, "engine": "vllm", "export": {}}
    )
    result = calibrate(spec)
    record = json.loads(Path(result["out"]["checkpoint"], "export.json").read_text())
    assert record["check"]["passed"]
    tables = join_tables(result["tables"])
    experts = tables["groups"].filter(pl.col("kind") == "experts")["op"].to_list()
    assert len(experts) == 4
    counted = tables["sensitivity"].filter(pl.col("op") == experts[0])["expert_tokens"]
    assert counted.list.sum().unique().to_list() == [8 * 16 * 2]
    of_experts = tables["timing"].filter(pl.col("signature").str.starts_with("gate_up_proj"))
    assert sorted(of_experts["configuration"].to_list()) == [["fp32"] * 2, ["int8"] * 2]
    plans = [plan for ref in result["plan_files"] for plan in read_json(ref)]
    for plan in plans:
        taken = plan["formats"]
        for layer in range(2):
            of = {taken[op] for op in experts if f".{layer}." in op}
            assert len(of) == 1
            assert taken.get(f"model.layers.{layer}.mlp.gate", "fp32") == "fp32"
    lowest = next(p for p in plans if p["strategy"] == "uniform_int8")
    assert {lowest["formats"][op] for op in experts} == {"int8"}
    weights = tables["groups"].filter(pl.col("kind").is_in(["linear", "experts"]))
    head = weights.filter(pl.col("op") == "lm_head")["parameters"].sum()
    scales = 4 * (weights["parameters"] // weights["in_features"]).sum() - 4 * 97
    assert lowest["weight_bytes"] == weights["parameters"].sum() + 3 * head + scales
    measured = tables["evaluation"].filter(
        pl.col("strategy") == "uniform_int8", pl.col("metric") == "kl"
    )
    assert (measured["value"] > 0).all()
    assert any(
        "experts" in row["constraint"]
        for ref in result["tables"].get("prices", [])
        for row in read(ref).iter_rows(named=True)
    )
