"""A cache in FP8 in a checkpoint: transformers, which simulates one, reads back what the plan has, layer by layer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from small_export import MORE, checkpoint, linears, plan_of
from torch import Tensor

from mpq.errors import MpqError
from mpq.export.exporting import export
from mpq.export.skeleton import skeleton
from mpq.models.attention import AttentionHandler, intercept
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import load_config, load_model

TEXT = Blocks(np.random.default_rng(0).integers(0, 97, (4, 32)))
ATTENTION = "model.layers.1.self_attn"
CACHE = {f"{ATTENTION}.{x}_matmul": "fp8_kv" for x in ("qk", "av")}


class Largest(AttentionHandler):
    """An attention whose keys and values are looked at."""

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.seen = [float(x.abs().max()) for x in (key, value)]
        return query, key, value


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.bfloat16), ("qwen3", torch.float32)], ids=["llama", "qwen3"]
)
def test_transformers_reads_the_plans_cache(
    tmp_path: Path, reloaded_here: None, kind: str, dtype: torch.dtype
) -> None:
    """Alone, and beside FP8 linears: what transformers simulates is mpq's run of the plan, closer than another draw of the rounding;
    the other layer's cache stays in base, for which the server has a switch; scales are powers of two with room above."""
    source, base = checkpoint(tmp_path / "model", kind, dtype), "bf16"
    lowered = {}
    if dtype == torch.float32:
        base = "fp32"
        lowered = {op: "fp8_e4m3" for op in linears(source) if "mlp" in op}
    made = export(plan_of(source, {**CACHE, **lowered}, base), source, tmp_path / "out", check=TEXT)
    found = made.check
    assert found["passed"]
    assert found["caches_unread"] == ()
    assert found["kl_plan_reloaded"] < 1e-3 * found["kl_base_plan"]
    assert made.caches == {"fp8_kv": [1], "base": [0]}
    assert made.serve.endswith(" --kv-cache-dtype-skip-layers 0")
    assert made.serve in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "export.json").read_text())["serve"] == made.serve
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate(section).kv_cache_scheme
    assert (read.num_bits, read.type, read.strategy, read.dynamic) == (8, "float", "tensor", False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    names = [f"model.layers.{i}.self_attn" for i in (0, 1)]
    model, each = load_model(source, base), {name: Largest() for name in names}
    with intercept(model, each), torch.inference_mode():
        model(input_ids=torch.from_numpy(TEXT.tokens), use_cache=False)
    for name, attention in each.items():
        for end, largest in zip(("k_scale", "v_scale"), attention.seen, strict=True):
            scale = float(tensors[f"{name}.{end}"])
            assert math.frexp(scale)[0] == 0.5
            assert 448 / 16 <= largest / scale < 448 / 8


def test_an_attention_that_transformers_does_not_simulate_is_named(
    tmp_path: Path, reloaded_here: None
) -> None:
    """GPT-NeoX has one linear for q, k and v under a name of its own: its check compares the rest, and says so."""
    source = checkpoint(tmp_path / "model", "gpt_neox")
    name = "gpt_neox.layers.0.attention"
    formats = {f"{name}.{x}_matmul": "fp8_kv" for x in ("qk", "av")}
    made = export(plan_of(source, formats), source, tmp_path / "out", check=TEXT)
    assert made.check["passed"]
    assert made.check["caches_unread"] == (name,)
    assert made.check["kl_base_plan"] == 0


def test_which_attentions_have_a_cache(tmp_path: Path) -> None:
    """Those of the decoder's layers, whatever else in them has a configuration of its own."""
    for kind in MORE:
        found = skeleton(load_config(checkpoint(tmp_path / kind, kind))).attentions
        owner, name = ("gpt_neox", "attention") if kind == "gpt_neox" else ("model", "self_attn")
        assert found == tuple(f"{owner}.layers.{i}.{name}" for i in (0, 1))


def test_what_no_file_or_engine_has_is_refused(tmp_path: Path) -> None:
    """Before anything is written: other engines and forms, K without V, a cache that is not there, and scales without text."""
    source, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    refused: list[tuple[dict[str, str], dict[str, str], str]] = [
        (CACHE, {"engine": "sglang"}, "not to compressed-tensors for sglang"),
        (CACHE, {"engine": "transformers"}, "to compressed-tensors for vllm alone"),
        (CACHE, {"to": "modelopt"}, "not to modelopt for vllm"),
        (CACHE, {}, "whose scales are measured on text before keys and values come"),
        ({f"{ATTENTION}.qk_matmul": "fp8_kv"}, {}, "one of K and V of model.layers.1.self_attn"),
        ({f"x.{x}_matmul": "fp8_kv" for x in ("qk", "av")}, {}, "x keeps no keys and values"),
        ({f"{ATTENTION}.qk_matmul": "fp8_e4m3"}, {}, "which a checkpoint cannot express"),
    ]
    for formats, how, why in refused:
        with pytest.raises(MpqError, match=why):
            export(plan_of(source, formats), source, out, **how)  # type: ignore[arg-type]
        assert not out.exists()
