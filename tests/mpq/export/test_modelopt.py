"""Plans in ModelOpt's way: read back by mpq's reader of published checkpoints, and by ModelOpt's own code where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import MIXTURES
from small_export import checkpoint, linears, plan_of

from mpq.errors import MpqError
from mpq.export.codes import tensors_of
from mpq.export.exporting import export
from mpq.export.modelopt import HELD, laid_out
from mpq.formats.quantize import fake_quantize
from mpq.formats.scheme import SCHEMES
from mpq.models.blocks import Blocks
from mpq.models.experts import dispatched
from mpq.models.loading import load_model

TEXT = Blocks(np.random.default_rng(0).integers(0, 97, (4, 48)))
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 4}
PYTHON = Path(os.environ.get("MPQ_MODELOPT", ".work/peers/modelopt")) / "bin" / "python"
_READ = """
import sys
from safetensors.torch import load_file, save_file
import torch
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor
t, out = load_file(sys.argv[1]), {}
for n in sorted({k.split("/")[0] for k in t}):
    of = {k.split("/")[1]: v for k, v in t.items() if k.startswith(n + "/")}
    w, s = of["weight"], of["weight_scale"]
    shape, f = torch.Size((300, 256)), torch.float32
    if "weight_scale_2" in of:
        q = NVFP4QTensor(shape, f, w)
        out[n] = q.dequantize(scale=s, double_scale=of["weight_scale_2"], block_sizes={-1: 16})
    elif s.dtype == torch.uint8:
        out[n] = MXFP8QTensor(shape, f, w).dequantize(scale=s)
    elif s.dim() == 4:
        out[n] = FP8QTensor(shape, f, w).dequantize(scale=s[:, 0, :, 0], block_sizes={-1: 128, -2: 128})
    else:
        out[n] = FP8QTensor(shape, f, w).dequantize(scale=s[:, None])
save_file({k: v.contiguous() for k, v in out.items()}, sys.argv[2])
"""


@pytest.mark.skipif(not PYTHON.exists(), reason="no ModelOpt: make peers, or set MPQ_MODELOPT")
def test_modelopt_reads_the_codes_back(tmp_path: Path) -> None:
    """ModelOpt's own dequantization makes of the tensors what fake_quantize rounds to, bit for bit."""
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(2))
    weight = (weight * torch.logspace(-3, 1, 300)[:, None]).bfloat16()
    tensors = {
        f"{name}/{end}": tensor.contiguous()
        for name in HELD
        for end, tensor in laid_out(
            tensors_of(weight, SCHEMES[name], torch.bfloat16, "w"), name
        ).items()
    }
    save_file(tensors, tmp_path / "in")
    subprocess.run([PYTHON, "-c", _READ, tmp_path / "in", tmp_path / "out"], check=True)
    found = load_file(tmp_path / "out")
    for name in HELD:
        want = fake_quantize(weight, SCHEMES[name].weights, "row")
        assert torch.equal(found[name].bfloat16(), want), name


@pytest.mark.usefixtures("reloaded_here")
def test_every_scheme_in_one_checkpoint(tmp_path: Path) -> None:
    """A layer in each scheme: mpq's reader of published checkpoints has every weight, the run is the plan's, both sections agree."""
    source = checkpoint(tmp_path / "model", "llama", torch.bfloat16, **WIDE)
    layers = dict(enumerate(("fp8_e4m3", "fp8_block", "mxfp8", "nvfp4")))
    formats = {
        op: layers[int(op.split(".")[2])]
        for op in linears(source, "bf16")
        if ".layers." in op and "o_proj" not in op
    }
    formats["model.layers.0.self_attn.o_proj"] = "nvfp4a16"
    made = export(
        plan_of(source, formats, "bf16"), source, tmp_path / "out", to="modelopt", check=TEXT
    )
    assert made.check["passed"], made.check
    beside = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert beside["quant_algo"] == said["quant_algo"] == "MIXED_PRECISION"
    assert set(beside["quantized_layers"]) == set(formats)
    assert "lm_head" in said["ignore"]
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert held["model.layers.0.self_attn.q_proj.weight_scale"].shape == (128,)
    assert held["model.layers.1.mlp.up_proj.weight_scale"].shape == (2, 1, 1, 1)
    assert held["model.layers.3.mlp.up_proj.input_scale"].shape == ()


def test_experts_are_in_it_one_by_one(tmp_path: Path) -> None:
    """A layer's experts in NVFP4, the other's in MXFP8, under the checkpoint's names, each in `quantized_layers`: mpq's reader of
    published checkpoints makes the plan's values of them, stacked, and the run is the plan's."""
    more = {**MIXTURES["mixtral"], **WIDE, "num_hidden_layers": 3}
    source = checkpoint(tmp_path / "model", "mixtral", torch.bfloat16, **more)
    model = load_model(source, "bf16")
    owners = {n: m for n, m in model.named_modules() if dispatched(m)}
    of_layer = dict(zip(owners, ("nvfp4", "mxfp8"), strict=False))
    formats = {f"{n}.{p}": f for n, f in of_layer.items() for p in ("gate_up_proj", "down_proj")}
    formats["model.layers.0.self_attn.o_proj"] = "fp8_e4m3"
    plan = plan_of(source, formats, "bf16")
    made = export(plan, source, tmp_path / "out", to="modelopt", engine="vllm", check=TEXT)
    assert made.check["passed"], made.check
    beside = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    said, names = beside["quantized_layers"], load_file(source / "model.safetensors")
    experts = [n.removesuffix(".weight") for n in names if ".experts." in n]
    lowered = {n for n in experts if ".layers.2." not in n}
    assert set(said) == {*lowered, "model.layers.0.self_attn.o_proj"}
    assert {n for n in said if said[n]["quant_algo"] == "NVFP4"} == {
        n for n in experts if ".layers.0." in n
    }
    kept = beside["exclude_modules"]
    assert any(fnmatch("model.layers.2.block_sparse_moe.experts", pattern) for pattern in kept)
    assert not any(p in n or fnmatch(n, p) for n in lowered for p in kept)
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert all(f"{n}.weight_scale" in held for n in lowered)
    read = load_model(tmp_path / "out", "bf16")
    for op, name in formats.items():
        if ".experts." in op:
            want = [fake_quantize(w, SCHEMES[name].weights, "row") for w in model.get_parameter(op)]
            assert torch.equal(read.get_parameter(op), torch.stack(want))
    fp8 = plan_of(source, dict.fromkeys(formats, "fp8_e4m3"), "bf16")
    with pytest.raises(MpqError, match="a ModelOpt checkpoint has experts in mxfp8, nvfp4"):
        export(fp8, source, tmp_path / "other", to="modelopt", engine="vllm")
    with pytest.raises(MpqError, match="mpq writes no experts for tensorrt-llm"):
        export(plan, source, tmp_path / "other", to="modelopt", engine="tensorrt-llm")


def test_what_modelopt_has_no_name_for(tmp_path: Path) -> None:
    """INT8, a base of 32 bits and an engine that reads no such file are refused by name, and nothing is written."""
    source = checkpoint(tmp_path / "model", "llama", **WIDE)
    op = "model.layers.0.mlp.down_proj"
    for formats, base, engine, said in (
        ({op: "int8"}, "bf16", "vllm", "runs in int8 .*it can hold fp8_e4m3, fp8_block"),
        ({op: "fp8_e4m3"}, "fp32", "vllm", "base is fp32: make the plan with base bf16"),
        (
            {op: "fp8_e4m3"},
            "bf16",
            "transformers",
            "transformers does not read what is exported to modelopt",
        ),
    ):
        with pytest.raises(MpqError, match=said):
            export(
                plan_of(source, formats, base),
                source,
                tmp_path / "out",
                to="modelopt",
                engine=engine,
            )
    assert not (tmp_path / "out").exists()
