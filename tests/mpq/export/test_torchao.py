"""Plans in torchao's way: the parts that are written, and, where torchao is there, what it and transformers make of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small import ROOT
from small_export import checkpoint, linears, plan_of

from mpq.errors import MpqError
from mpq.export import exporting
from mpq.export.exporting import export
from mpq.export.torchao import HELD
from mpq.formats.quantize import fake_quantize
from mpq.formats.scheme import SCHEMES
from mpq.models.blocks import Blocks
from mpq.program.plan import Plan

TEXT = Blocks(np.random.default_rng(0).integers(0, 97, (4, 48)))
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
FOLDER = Path(os.environ.get("MPQ_TORCHAO", ".work/peers/torchao")).resolve()
installed = pytest.mark.skipif(
    not (FOLDER / "torchao").exists(), reason="no torchao: make peers, or set MPQ_TORCHAO"
)
# each module's configuration is given to torchao, which quantizes a weight by it: its header beside the one that mpq wrote
_HEADERS = """
import json, sys
import torch, torchao.quantization.quant_api as api
from safetensors import safe_open
from torchao.core.config import config_from_dict
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
api._check_hardware_support = lambda granularity: None  # FP8 is made on GPUs alone
section, file = json.load(open(sys.argv[1] + "/config.json")), safe_open(sys.argv[1] + "/model.safetensors", "pt")
said, header = config_from_dict(section["quantization_config"]["quant_type"]["default"]), file.metadata()
for op, config in said.fqn_to_config.items():
    rows, columns = file.get_slice(op + "._weight_qdata").get_shape()
    linear = torch.nn.Sequential(torch.nn.Linear(columns, rows, dtype=torch.bfloat16))
    api.quantize_(linear, config)
    parts, of = flatten_tensor_state_dict({op + ".weight": linear[0].weight.data})
    want, have = json.loads(of[op + ".weight"]), json.loads(header[op + ".weight"])
    if want["_type"] == "Int8Tensor":  # zeros, which may be left out
        want["_tensor_data_names"].remove("zero_point")
    assert have["_data"] == want["_data"] and have["_type"] == want["_type"], (op, have, want)
    assert sorted(have["_tensor_data_names"]) == sorted(want["_tensor_data_names"]), op
    for part in have["_tensor_data_names"]:
        ours, theirs = file.get_tensor(f"{op}._weight_{part}"), parts[f"{op}._weight_{part}"]
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (op, part)
"""


def every_scheme(source: Path, base: str) -> Plan:
    """A linear in each scheme that torchao has, the head in INT8."""
    names = iter(HELD)
    formats = {op: next(names, base) for op in linears(source, base) if ".layers." in op}
    assert set(HELD) <= set(formats.values())
    return plan_of(source, {**formats, "lm_head": "int8"}, base)


def test_the_parts_are_the_rounding(tmp_path: Path) -> None:
    """Codes times scales are what fake_quantize rounds to, bit for bit; the header names each tensor of all shards."""
    source = checkpoint(tmp_path / "model", "llama", torch.bfloat16, **WIDE)
    plan = every_scheme(source, "bf16")
    made = export(plan, source, tmp_path / "out", to="torchao", shard_bytes=60_000)
    assert made.engine == "transformers"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from_pretrained(FOLDER)` loads it where torchao is installed" in card
    assert len(made.files) > 3
    held = {n: t for file in made.files for n, t in load_file(tmp_path / "out" / file).items()}
    assert made.weight_bytes == sum(t.nbytes for t in held.values())
    weights = load_file(source / "model.safetensors")
    for op, name in plan.lowered.items():
        codes, scale = (held[f"{op}._weight_{part}"] for part in ("qdata", "scale"))
        values = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale.float()[..., None]
        want = fake_quantize(weights[f"{op}.weight"], SCHEMES[name].weights, "row")
        assert torch.equal(values.flatten(-2).bfloat16(), want), name
    for file in made.files:
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            header = shard.metadata()
        assert set(json.loads(header["tensor_names"])) == set(weights)
        assert json.loads(header["model.norm.weight"]) == {"_type": "Tensor"}


def test_what_torchao_has_no_tensor_for(tmp_path: Path) -> None:
    """Prototypes, activations that it rounds otherwise and other engines are refused by name, and nothing is written."""
    source = checkpoint(tmp_path / "model", "llama", torch.bfloat16, **WIDE)
    op = "model.layers.0.mlp.down_proj"
    for name, engine, said in (
        ("mxfp8", None, "runs in mxfp8 .*it can hold int8, fp8_e4m3, w8a16"),
        ("w4a8", None, "runs in w4a8 .*cannot express"),
        ("int8", "vllm", "vllm does not read what is exported to torchao: export it for transf"),
    ):
        plan = plan_of(source, {op: name}, "bf16")
        with pytest.raises(MpqError, match=said):
            export(plan, source, tmp_path / "out", to="torchao", engine=engine)
    assert not (tmp_path / "out").exists()


def test_the_check_needs_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchao is not installed one sentence says how, before anything is written."""
    source = checkpoint(tmp_path / "model", "llama", torch.bfloat16, **WIDE)
    monkeypatch.setattr("mpq.errors.find_spec", lambda module: None)
    with pytest.raises(MpqError, match=r"torchao is not installed.*pip install 'mpq\[torchao\]'"):
        export(plan_of(source, {}, "bf16"), source, tmp_path / "out", to="torchao", check=TEXT)
    assert not (tmp_path / "out").exists()


@installed
def test_transformers_and_torchao_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process loads every scheme in one checkpoint with TorchAoConfig: torchao's dequantization gives the plan's values,
    bit for bit, its linears the plan's loss; and its own configurations make tensors of the same classes, attributes and shapes."""
    source = checkpoint(tmp_path / "model", "llama", torch.bfloat16, **WIDE)
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER}{os.pathsep}{ROOT}")
    monkeypatch.setattr(exporting, "_require_reader", lambda to: None)  # the other has it
    plan = every_scheme(source, "bf16")
    made = export(plan, source, tmp_path / "out", to="torchao", check=TEXT)
    assert made.check["passed"], made.check
    assert made.check["kl_plan_reloaded"] < made.check["kl_noise"]
    subprocess.run([sys.executable, "-c", _HEADERS, tmp_path / "out"], check=True)
