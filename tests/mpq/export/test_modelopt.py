"""Plans in ModelOpt's way: read back by mpq's reader of published checkpoints, and by ModelOpt's own code where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_export import checkpoint, linears, plan_of

from mpq.errors import MpqError
from mpq.export.codes import tensors_of
from mpq.export.exporting import export
from mpq.export.modelopt import HELD, laid_out
from mpq.formats.quantize import fake_quantize
from mpq.formats.scheme import SCHEMES
from mpq.models.blocks import Blocks

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
