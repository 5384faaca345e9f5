"""gpt-oss exported in its own form: experts in MXFP4, a layer's in one tensor, read back by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import MIXTURES, small_model
from small_export import linears, plan_of

from mpq.errors import MpqError
from mpq.export.check import compare
from mpq.export.exporting import check_exportable, export
from mpq.export.reload import loaded_model, log_probabilities
from mpq.formats.quantize import fake_quantize
from mpq.formats.scheme import get_scheme
from mpq.models.blocks import Blocks
from mpq.models.loading import load_model

BLOCKS = Blocks(np.random.default_rng(0).integers(0, 97, (4, 32)))
EXPERTS = [
    f"model.layers.{i}.mlp.experts.{p}" for i in range(2) for p in ("gate_up_proj", "down_proj")
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss in BF16, biases drawn as well, whose rows are whole blocks wide."""
    more = {**MIXTURES["gpt_oss"], "hidden_size": 64, "intermediate_size": 32}
    model = small_model("gpt_oss", dtype=torch.bfloat16, **more)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("gpt-oss") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", ["mxfp4a16", "mxfp4a16_mse"])
def test_transformers_reads_the_plan(source: Path, tmp_path: Path, scheme: str) -> None:
    """Blocks and scales in the shapes of OpenAI's checkpoints; transformers makes the plan's weights of them, bit for bit, and the
    plan's loss. Exported once more from there, they stay what they are."""
    formats = dict.fromkeys(EXPERTS, scheme)
    out, again = tmp_path / "out", tmp_path / "again"
    how = {"to": "mxfp4", "engine": "transformers"}
    made = export(plan_of(source, formats, "bf16"), source, out, **how)
    assert made.formats == {scheme: 4}
    assert "from_pretrained(FOLDER)` loads it.\n" in (out / "README.md").read_text()
    held = load_file(out / "model.safetensors")
    assert held[f"{EXPERTS[0]}_blocks"].shape == (4, 64, 2, 16)
    assert held[f"{EXPERTS[1]}_scales"].shape == (4, 64, 1)
    assert made.weight_bytes == sum(t.numel() * t.element_size() for t in held.values())
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "mxfp4"
    base, found = load_model(source, "bf16"), loaded_model(out, "bf16")
    for op in EXPERTS:
        weights = base.get_parameter(op)
        want = [fake_quantize(w.T, get_scheme(scheme).weights, "row").T for w in weights]
        assert not torch.equal(torch.stack(want), weights)
        assert torch.equal(found.get_parameter(op), torch.stack(want))
    with torch.inference_mode():
        log_p = log_probabilities(found, torch.from_numpy(BLOCKS.tokens)).numpy()
    check = compare(base, formats, "bf16", BLOCKS, log_p)
    assert check.passed, check
    assert check.kl_base_reloaded > 10 * check.kl_plan_reloaded
    export(plan_of(out, dict.fromkeys(EXPERTS, "mxfp4a16"), "bf16"), out, again, to="mxfp4")
    twice = load_model(again, "bf16")
    assert all(torch.equal(twice.get_parameter(op), found.get_parameter(op)) for op in EXPERTS)


def test_what_the_form_cannot_hold(source: Path, tmp_path: Path) -> None:
    """Other formats, lowered linears, layers apart, another base, another model, and another form for these experts: a sentence each."""
    every = dict.fromkeys(EXPERTS, "mxfp4a16")
    llama = tmp_path / "llama"
    small_model("llama").save_pretrained(llama)
    for of, formats, base, to, told in (
        (source, dict.fromkeys(EXPERTS, "mxfp4"), "bf16", "mxfp4", "experts in mxfp4a16"),
        (source, {**every, linears(source)[0]: "mxfp4a16"}, "bf16", "mxfp4", "experts alone"),
        (source, dict.fromkeys(EXPERTS[:2], "mxfp4a16"), "bf16", "mxfp4", "of all layers"),
        (source, every, "fp32", "mxfp4", "base bf16"),
        (llama, {linears(llama)[0]: "mxfp4a16"}, "bf16", "mxfp4", "this is a llama"),
        (source, every, "bf16", "compressed-tensors", "export --to mxfp4"),
    ):
        with pytest.raises(MpqError, match=told):
            check_exportable(formats, base, of, "vllm", to=to)
