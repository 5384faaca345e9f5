"""Plans exported to compressed-tensors: what transformers and compressed-tensors' own reader make of the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from small import small_model
from small_export import MORE, checkpoint, linears, mixed, plan_of

from mpq.errors import MpqError
from mpq.export import folder, shards, writing
from mpq.export.check import Check, compare
from mpq.export.engines import fused_together, split_ties
from mpq.export.exporting import Exported, export
from mpq.export.reload import differing, loaded_model, log_probabilities
from mpq.formats.format import get_format
from mpq.formats.quantize import fake_quantize
from mpq.models.blocks import Blocks
from mpq.models.loading import load_model
from mpq.program.engines import ENGINES as PLANNED
from mpq.program.plan import Plan
from mpq.serving.fused import FUSED

BLOCKS = Blocks(np.random.default_rng(0).integers(0, 97, (4, 48)))


def compared(source: Path, out: Path, plan: Plan) -> Check:
    """The export as this process loads it, beside mpq's run of the plan."""
    model = loaded_model(out, plan.base)
    names = {
        op: (file, f"{op}.weight")
        for file in ["model.safetensors"]
        for op in plan.formats
        if f"{op}.weight" in load_file(source / file)
    }
    wrong = differing(model, source, names, plan.lowered, plan.base)
    with torch.inference_mode():
        found = log_probabilities(model, torch.from_numpy(BLOCKS.tokens)).numpy()
    return compare(load_model(source, plan.base), plan.lowered, plan.base, BLOCKS, found, wrong)


@pytest.mark.parametrize("kind", list(MORE))
def test_reloaded_in_transformers(tmp_path: Path, kind: str) -> None:
    """Six architectures, tied, biased and fused ones among them, in INT8 and FP8: transformers' loss is that of mpq's run."""
    source = checkpoint(tmp_path / "model", kind)
    plan = plan_of(source, mixed(linears(source)))
    made = export(plan, source, tmp_path / "out")
    found = compared(source, tmp_path / "out", plan)
    assert found.passed, found
    assert made.formats == {
        "int8": 2 * (2 if kind in ("gpt_neox", "phi3") else 4),
        "fp8_e4m3": made.formats["fp8_e4m3"],
    }
    assert not made.check["done"]


@pytest.mark.parametrize("base", ["bf16", "fp16"])
def test_sources_and_bases(tmp_path: Path, base: str) -> None:
    """A checkpoint in one dtype is exported in the plan's base: rounding starts from the weights that the plan runs on."""
    source = checkpoint(
        tmp_path / "model", dtype=torch.bfloat16 if base == "fp16" else torch.float32
    )
    ops = linears(source, base)
    plan = plan_of(source, {op: base if op == "lm_head" else "int8" for op in ops}, base)
    export(plan, source, tmp_path / "out")
    found = compared(source, tmp_path / "out", plan)
    assert found.passed, found
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == get_format(base).dtype
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == getattr(torch, get_format(base).dtype)


def test_fp8_alone_is_exact(tmp_path: Path) -> None:
    """FP8 scales are defined alike everywhere: reloaded in FP32, log-probabilities are those of mpq's run."""
    source = checkpoint(tmp_path / "model")
    plan = plan_of(source, dict.fromkeys(linears(source), "fp8_e4m3"))
    export(plan, source, tmp_path / "out", engine="transformers")
    found = compared(source, tmp_path / "out", plan)
    assert found.kl_plan_reloaded < 1e-9 < found.kl_base_plan
    assert found.loss_reloaded == pytest.approx(found.loss_plan, abs=1e-6)


def test_the_file_as_compressed_tensors_reads_it(tmp_path: Path) -> None:
    """Its own reader finds each group's format and scheme, and every linear is a target or ignored, once."""
    source = checkpoint(tmp_path / "model")
    ops = linears(source)
    plan = plan_of(source, mixed(ops) | {"model.layers.1.mlp.down_proj": "fp32"})
    export(plan, source, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate(said)
    assert read.format == "mixed-precision"
    groups = {group.format: group for group in read.config_groups.values()}
    assert set(groups) == {"int-quantized", "float-quantized"}
    for name, group in groups.items():
        weights, inputs = group.weights, group.input_activations
        assert weights.type == inputs.type == name.partition("-")[0]
        assert (weights.strategy, weights.dynamic) == ("channel", False)
        assert (inputs.strategy, inputs.dynamic) == ("token", True)
    named = [t for group in groups.values() for t in group.targets] + read.ignore
    assert sorted(named) == sorted(ops)
    assert {"lm_head", "model.layers.1.mlp.down_proj"} == set(read.ignore)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    codes = tensors["model.layers.0.self_attn.q_proj.weight"]
    scale = tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    weight = load_file(source / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert (codes.dtype, scale.dtype, tuple(scale.shape)) == (torch.int8, torch.float32, (32, 1))
    assert torch.equal(codes * scale, fake_quantize(weight, get_format("int8"), "row"))


def test_a_tied_head_that_is_lowered(tmp_path: Path) -> None:
    """It becomes a tensor of its own, the embedding stays as it was, and nothing is tied any more."""
    source = checkpoint(tmp_path / "model", tie_word_embeddings=True)
    plan = plan_of(source, mixed(linears(source)) | {"lm_head": "int8"})
    made = export(plan, source, tmp_path / "out")
    found = compared(source, tmp_path / "out", plan)
    assert found.passed, found
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    of_source = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"], of_source)
    assert tensors["lm_head.weight"].dtype == torch.int8
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    assert "lm_head" in made.notes[0]


def test_shards_and_what_lies_beside(tmp_path: Path) -> None:
    """A checkpoint of many files becomes one of many files, smaller where a limit asks for it; the tokenizer comes along."""
    source = tmp_path / "model"
    small_model("llama", **MORE["llama"]).save_pretrained(source, max_shard_size="20KB")
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ x }}")
    (source / "notes.txt").write_text("private")
    plan = plan_of(source, mixed(linears(source)))
    made = export(plan, source, tmp_path / "out", shard_bytes=12_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == set(made.files)
    assert len(files) > len(list(source.glob("*.safetensors"))) > 1
    held = {name: f for f in files for name in load_file(tmp_path / "out" / f)}
    assert held == index["weight_map"]
    there = {f.name for f in (tmp_path / "out").iterdir()} - files
    assert there == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "export.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "plan.json",
        "tokenizer.json",
    }
    model = loaded_model(tmp_path / "out", "fp32")
    with torch.inference_mode():
        found = log_probabilities(model, torch.from_numpy(BLOCKS.tokens)).numpy()
    assert compare(load_model(source, "fp32"), plan.lowered, "fp32", BLOCKS, found).passed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "8 of 15 linears in int8" in card
    assert "- `int8`: weights INT8, row; activations INT8, row" in card
    assert "0.0001 nats²" in card


def test_what_the_check_refuses(tmp_path: Path) -> None:
    """A scale that is another, a linear left in base, and a model of other weights: none passes."""
    source = checkpoint(tmp_path / "model")
    plan = plan_of(source, mixed(linears(source)))
    export(plan, source, tmp_path / "out")
    assert not compared(
        source, tmp_path / "out", replace(plan, formats={**plan.formats, "lm_head": "int8"})
    ).passed
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_scale"][3] *= 1.1
    shards.save_file(tensors, file, metadata={"format": "pt"})
    found = compared(source, tmp_path / "out", plan)
    assert found.differing == ("the scales of model.layers.0.mlp.up_proj are others",)
    assert not found.passed
    assert not replace(found, differing=(), kl_plan_reloaded=2 * found.kl_tolerance).passed


def test_cut_off_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off after two shards there is no folder; run again, those two are kept and the rest is written."""
    source = tmp_path / "model"
    small_model("llama", **MORE["llama"]).save_pretrained(source, max_shard_size="20KB")
    plan, out = plan_of(source, mixed(linears(source))), tmp_path / "out"
    whole = export(plan, source, tmp_path / "whole")
    written: list[str] = []
    write = shards.write_shard

    def full(shard: shards.Shard, *how: object) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(shard.file)
        write(shard, *how)

    monkeypatch.setattr(shards, "write_shard", full)
    with pytest.raises(MpqError, match="the disk is full"):
        export(plan, source, out)
    assert not out.exists()
    (tmp_path / ".out.partial" / written[1]).write_bytes(b"damaged")
    again: list[str] = []
    monkeypatch.setattr(
        shards, "write_shard", lambda s, *how: (again.append(s.file), write(s, *how))
    )
    made = export(plan, source, out)
    assert set(again) == set(whole.files) - {written[0]}
    assert made.files == whole.files
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_places_that_others_made_are_not_used(tmp_path: Path) -> None:
    """A lock that is a link is not followed, nor is what a shared folder holds under the name of the one to be written."""
    source, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    plan = plan_of(source, mixed(linears(source)))
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(MpqError, match=r"The lock .* cannot be opened .*: take it away"):
        export(plan, source, out)
    assert (tmp_path / "theirs").read_text() == "theirs"
    (tmp_path / ".out.lock").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MpqError, match="was put there by someone else"):
        export(plan, source, out)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_other_work_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another plan's export left behind is written anew."""
    source, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    ops = linears(source)
    monkeypatch.setattr(writing, "check_room", lambda *_: None)
    monkeypatch.setattr(folder.Aside, "finish", lambda self: None)
    export(plan_of(source, dict.fromkeys(ops, "int8")), source, out)
    monkeypatch.undo()
    export(plan_of(source, dict.fromkeys(ops, "fp8_e4m3")), source, out)
    kinds = {
        t.dtype
        for n, t in load_file(out / "model.safetensors").items()
        if "proj.w" in n and "scale" not in n
    }
    assert kinds == {torch.float8_e4m3fn}


def refused(plan: Plan, source: Path, out: Path, match: str, **how: object) -> None:
    """The export says so in one sentence, and nothing is written."""
    before = sorted(f.name for f in out.parent.iterdir())
    with pytest.raises(MpqError, match=match):
        export(plan, source, out, **how)  # type: ignore[arg-type]
    assert sorted(f.name for f in out.parent.iterdir()) == before


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that cannot be exported is told before anything is written."""
    source, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    layer = "model.layers.0."
    attention = [f"{layer}self_attn.{x}_proj" for x in "qkv"]
    split = dict(zip(attention, ("int8", "fp8_e4m3", "int8"), strict=True))

    def plan(formats: Mapping[str, str]) -> Plan:
        return plan_of(source, formats)

    refused(replace(plan({}), fingerprint="0" * 64), source, out, "another|made for a model with")
    refused(plan({f"{layer}mlp.down_proj": "fp8_e5m2"}), source, out, "it can hold fp8_e4m3, int8,")
    refused(plan({f"{layer}mlp.down_proj": "bf16"}), source, out, "one base format")
    refused(plan({f"{layer}self_attn.qk_matmul": "int8"}), source, out, "pin them to base")
    refused(plan({f"{layer}mlp.nothing": "int8"}), source, out, "no linear .*nothing")
    refused(plan(split), source, out, "q_proj in int8, k_proj in fp8_e4m3, v_proj in int8")
    refused(
        plan({f"{layer}mlp.up_proj": "int8"}), source, out, "gate_proj in fp32, up_proj in int8"
    )
    refused(plan({}), source, out, "Unknown engine", engine="tgi")
    refused(plan({}), source, out, "Unknown target", to="gguf")
    refused(plan({}), source, source, "where the checkpoint itself lies")
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))
    refused(plan({}), source, out, "GB free")
    monkeypatch.undo()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    refused(plan({}), source, out, "is not empty")
    refused(plan({}), source, out, "something else than an export", overwrite=True)
    assert (out / "mine.txt").read_text() == "mine"
    made = export(plan(split), source, tmp_path / "split", engine="transformers")
    assert made.formats == {"int8": 2, "fp8_e4m3": 1}
    made = export(plan({}), source, tmp_path / "split", overwrite=True)
    assert not made.formats
    assert "quantization_config" not in (tmp_path / "split/config.json").read_text()


def test_conv1d(tmp_path: Path) -> None:
    """GPT-2's transposed linears stay in base: compressed-tensors gives a Conv1D no scheme, whatever config.json says."""
    from compressed_tensors.quantization import apply_quantization_config

    source = checkpoint(tmp_path / "model", "gpt2", n_positions=64)
    op = "transformer.h.0.mlp.c_fc"
    refused(plan_of(source, {op: "int8"}), source, tmp_path / "out", "is a Conv1D")
    model = load_model(source, "fp32")
    group = {"group_0": {"targets": [op], "weights": {"num_bits": 8, "strategy": "channel"}}}
    config = QuantizationConfig.model_validate({"config_groups": group})
    apply_quantization_config(model, config, show_progress=False)
    assert not hasattr(model.get_submodule(op), "quantization_scheme")


@pytest.mark.usefixtures("reloaded_here")
def test_transposed_weights_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Conv1D whose weight is another by what no loss would show is named by the check; as it was, it passes."""
    source = checkpoint(tmp_path / "model", "gpt2", n_positions=64)
    op, save = "transformer.h.0.mlp.c_fc", shards.save_file
    made = export(plan_of(source, {}), source, tmp_path / "out", check=BLOCKS)
    assert made.check["passed"]

    def spoilt(tensors: dict[str, torch.Tensor], *how: object, **more: object) -> None:
        tensors[f"{op}.weight"][0, 0] *= 1 + 2**-20
        save(tensors, *how, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "save_file", spoilt)
    with pytest.raises(MpqError, match=f"first of 1 differences: the weight of {op} is another"):
        export(plan_of(source, {}), source, tmp_path / "other", check=BLOCKS)


def test_not_finite(tmp_path: Path) -> None:
    """A weight that is not a number has no codes: an export of plausible zeros is refused."""
    source = checkpoint(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    shards.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    plan = plan_of(source, {"model.layers.0.mlp.down_proj": "int8"})
    with pytest.raises(MpqError, match="not finite"):
        export(plan, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantized_source(tmp_path: Path) -> None:
    """A checkpoint that is quantized already is exported as the values that it stands for: what stays in base holds them."""
    source = checkpoint(tmp_path / "model")
    first, other = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
    export(plan_of(source, {first: "int8"}), source, tmp_path / "once")
    plan = plan_of(tmp_path / "once", {other: "fp8_e4m3"})
    export(plan, tmp_path / "once", tmp_path / "twice")
    assert compared(tmp_path / "once", tmp_path / "twice", plan).passed
    held = load_file(tmp_path / "twice" / "model.safetensors")
    assert held[f"{other}.weight"].dtype == torch.float8_e4m3fn
    assert f"{first}.weight_scale" not in held
    values = load_model(tmp_path / "once", "fp32").get_parameter(f"{first}.weight")
    assert torch.equal(held[f"{first}.weight"], values)
    assert not torch.equal(values, load_model(source, "fp32").get_parameter(f"{first}.weight"))


def test_json(tmp_path: Path) -> None:
    """JSON holds any plan, attention's products too, and reads back as the plan."""
    source = checkpoint(tmp_path / "model")
    plan = plan_of(source, {"model.layers.0.self_attn.qk_matmul": "fp8_e5m2"})
    made = export(plan, source, tmp_path / "out", to="json")
    assert isinstance(made, Exported)
    assert Plan.from_json((tmp_path / "out/plan.json").read_text()) == plan
    assert json.loads((tmp_path / "out/formats.json").read_text())["formats"] == plan.formats


def test_checked_by_a_fresh_process(tmp_path: Path) -> None:
    """The whole export with its check, in another process; export.json has the numbers."""
    source = checkpoint(tmp_path / "model")
    plan = plan_of(source, mixed(linears(source)))
    made = export(plan, source, tmp_path / "out", check=BLOCKS)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["check"] == json.loads(json.dumps(made.check))
    assert made.check["passed"]
    assert made.check["tokens"] == 4 * 47


def test_ties_are_a_table() -> None:
    """Every fused layer says where the engine has it, the program ties what the export compares, and parts that a model
    lacks do not count; w1 and w3 are gate and up of three, w2 and w1 of two."""
    assert all(layer.source and len(layer.parts) > 1 for layer in FUSED)
    tied = {rule.patterns for rule in PLANNED["vllm"].rules if rule.formats is None}
    assert {tuple(f"*.{part}" for part in layer.parts) for layer in FUSED} <= tied
    three = ["m.w1", "m.w2", "m.w3"]
    assert fused_together(three, "vllm") == [["m.w1", "m.w3"]]
    assert not list(split_ties({"m.w2": "int8"}, three, "bf16", "vllm"))
    assert list(split_ties({"m.w1": "int8"}, three, "bf16", "vllm"))
    assert list(split_ties({"m.w1": "int8"}, three[:2], "bf16", "vllm"))
    assert fused_together(three, "transformers") == []
    ops = ["a.q_proj", "a.k_proj", "b.gate_proj"]
    assert not list(split_ties({"b.gate_proj": "int8"}, ops, "bf16", "vllm"))
    ((layer, chosen),) = split_ties({"a.q_proj": "int8"}, ops, "bf16", "vllm")
    assert (layer.into, chosen) == ("qkv_proj", {"a.q_proj": "int8", "a.k_proj": "bf16"})
