"""Every scheme on its way into a checkpoint: compressed-tensors' own reader, transformers, and what it takes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from small_export import checkpoint, linears, plan_of
from test_export import compared

from mpq.errors import MpqError
from mpq.export.codes import sizes_of, tensors_of
from mpq.export.exporting import export
from mpq.export.scheme import quantization_config
from mpq.export.skeleton import Skeleton
from mpq.formats.quantize import fake_quantize
from mpq.formats.scheme import SCHEMES
from mpq.models.blocks import Blocks
from mpq.models.loading import load_model
from mpq.program.memory import bytes_of
from mpq.serving.schemes import EXPORTED, stored_as

TEXT = Blocks(np.random.default_rng(0).integers(0, 97, (4, 48)))
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}


def read_as(name: str) -> QuantizationScheme:
    """A scheme as compressed-tensors reads it back from an exported config.json."""
    model = Skeleton(("a",), frozenset("a"), frozenset(), (), frozenset(), "", "", "")
    config = QuantizationConfig.model_validate(quantization_config({"a": name}, model))
    (group,) = config.config_groups.values()
    assert isinstance(group, QuantizationScheme)
    return group


@pytest.mark.parametrize("name", EXPORTED)
def test_compressed_tensors_reads_the_codes_back(name: str) -> None:
    """Its own decompressor makes of the tensors what fake_quantize rounds to, bit for bit, in chunks and whole."""
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(2))
    weight = (weight * torch.logspace(-3, 1, 300)[:, None]).bfloat16()
    weight[5], weight[7, :32] = 0, 0
    scheme = SCHEMES[name]
    tensors = tensors_of(weight, scheme, torch.bfloat16, "w")
    assert {k: t.nbytes for k, t in tensors.items()} == {
        k: size for k, size in sizes_of(scheme, (300, 256)).items() if k != "input_global_scale"
    }
    reader = BaseCompressor.get_value_from_registry(stored_as(scheme))
    found = reader.decompress(dict(tensors), read_as(name))["weight"]
    want = fake_quantize(weight, scheme.weights, "row")
    if found.dtype == torch.float32:  # beside FP32 scales the product is not rounded to BF16
        found = found.bfloat16()
    assert torch.equal(found, want)


@pytest.mark.parametrize("name", [n for n in EXPORTED if not n.startswith("w4a8")])
def test_memory_counts_what_the_file_holds(name: str) -> None:
    """A plan's bytes of a weight are those of its tensors, but for the few that say its shape and its input's scale.
    (A 4-bit integer beside activations has a byte in the file: the engine packs it.)"""
    row = {"kind": "linear", "parameters": 300 * 256, "in_features": 256, "out_features": 300}
    assert (
        0 <= sum(sizes_of(SCHEMES[name], (300, 256)).values()) - bytes_of(row, name, "bf16") <= 16
    )


@pytest.mark.usefixtures("reloaded_here")
def test_all_schemes_in_one_checkpoint(tmp_path: Path) -> None:
    """Each linear in another scheme, beside base BF16: transformers loads it, holds every code, and is mpq's run of the plan.
    Read as a checkpoint to be calibrated, its weights are what the source's were rounded to."""
    source = checkpoint(
        tmp_path / "model", "llama", torch.bfloat16, **{**WIDE, "num_hidden_layers": 3}
    )
    names = iter(EXPORTED)
    ops = [op for op in linears(source, "bf16") if ".layers." in op]
    formats = {op: next(names, "bf16") for op in ops}
    assert set(EXPORTED) <= set(formats.values())
    plan = plan_of(source, formats, "bf16")
    made = export(plan, source, tmp_path / "out", engine="transformers", check=TEXT)
    assert made.check["passed"], made.check
    assert made.formats == dict.fromkeys(EXPORTED, 1)
    assert compared(source, tmp_path / "out", plan).passed
    held, before = load_model(tmp_path / "out", "bf16"), load_model(source, "bf16")
    for op, name in plan.lowered.items():
        weight = before.get_parameter(f"{op}.weight")
        want = fake_quantize(weight, SCHEMES[name].weights, "row")
        assert torch.equal(held.get_parameter(f"{op}.weight"), want), name


def test_four_bits_beside_what_cannot_read_them(tmp_path: Path) -> None:
    """A base that compressed-tensors does not multiply with, and a range that nobody has measured, are told before the work."""
    source = checkpoint(tmp_path / "model", "llama", **WIDE)
    op = "model.layers.0.mlp.up_proj"
    with pytest.raises(MpqError, match=r"runs in nvfp4 .*make the plan with base bf16"):
        export(plan_of(source, {op: "nvfp4"}), source, tmp_path / "out", engine="transformers")
    plan = plan_of(source, {op: "nvfp4"}, "bf16")
    with pytest.raises(MpqError, match=r"measured on text .* with nvfp4a16"):
        export(plan, source, tmp_path / "out", engine="transformers")
    assert not (tmp_path / "out").exists()


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """A hand-made plan that puts 96 inputs into blocks of 128 is refused by name, and nothing is written."""
    narrow = WIDE | {"intermediate_size": 96}
    source = checkpoint(tmp_path / "model", "llama", torch.bfloat16, **narrow)
    plan = plan_of(source, {"model.layers.0.mlp.down_proj": "w4a16"}, "bf16")
    with pytest.raises(MpqError, match=r"has 96 inputs and runs in w4a16 .* blocks are 128 wide"):
        export(plan, source, tmp_path / "out", engine="transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("reloaded_here")
def test_fused_layers_share_one_scale(tmp_path: Path) -> None:
    """q, k and v in NVFP4 have the tensor's scale of the largest of them, as vLLM takes one for all (docs/engines.md)."""
    from safetensors.torch import load_file

    source = checkpoint(tmp_path / "model", "llama", torch.bfloat16, **WIDE)
    parts = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    plan = plan_of(source, dict.fromkeys(parts, "nvfp4a16"), "bf16")
    export(plan, source, tmp_path / "out", engine="vllm", check=TEXT)
    held = load_file(tmp_path / "out" / "model.safetensors")
    weights = load_file(source / "model.safetensors")
    largest = max(float(weights[f"{p}.weight"].abs().max()) for p in parts)
    scales = [float(held[f"{p}.weight_global_scale"]) for p in parts]
    assert scales == [2.0 ** math.floor(math.log2(448 * 6 / largest))] * 3
