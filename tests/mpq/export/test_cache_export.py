"""A cache in FP8 in a checkpoint: transformers, which simulates one, reads back what the plan has, layer by layer."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from small import small_config, write_checkpoint
from small_export import MORE, checkpoint, linears, plan_of
from torch import Tensor
from walk import tiny

from mpq.errors import MpqError
from mpq.export import folder, shards, writing
from mpq.export.cache import Caches, caches_of, scales_of
from mpq.export.exporting import export
from mpq.export.ranges import largest_in
from mpq.export.skeleton import skeleton
from mpq.models.attention import AttentionHandler, intercept
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import load_config
from mpq.models.loading import load_model
from mpq.running.attention import PRODUCTS

TEXT = Blocks(np.random.default_rng(0).integers(0, 97, (4, 32)))
ATTENTION = "model.layers.1.self_attn"
CACHE = {f"{ATTENTION}.{x}_matmul": "fp8_kv" for x in ("qk", "av")}


class Largest(AttentionHandler):
    """An attention whose keys and values are looked at."""

    seen = [0.0, 0.0]  # noqa: RUF012 (replaced, never changed)

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of = zip(self.seen, (key, value), strict=True)
        self.seen = [max(before, float(x.abs().max())) for before, x in of]
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
    tmp_path: Path, reloaded_here: None, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-NeoX has one linear for q, k and v under a name of its own: its check compares the rest, that linear in INT8 too, and says
    so, as the card and a warning do."""
    source, out = checkpoint(tmp_path / "model", "gpt_neox"), tmp_path / "out"
    name = "gpt_neox.layers.0.attention"
    formats = {f"{name}.{x}_matmul": "fp8_kv" for x in ("qk", "av")}
    formats[f"{name}.query_key_value"] = "int8"
    with caplog.at_level(logging.WARNING, "mpq"):
        made = export(plan_of(source, formats), source, out, check=TEXT)
    assert made.check["passed"]
    assert made.check["caches_unread"] == (name,)
    assert made.check["kl_base_plan"] > 1e-6
    assert "| KL from base, caches in base |" in (out / "README.md").read_text()
    assert f"transformers rounds no cache of {name}: what" in caplog.text
    assert "every layer" not in caplog.text


def test_a_scale_that_is_another_is_no_plan(
    tmp_path: Path, reloaded_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale twice the plan's rounds to the same values: it is told by itself."""
    source, save = checkpoint(tmp_path / "model"), shards.save_file

    def doubled(tensors: dict[str, Tensor], *how: object, **more: object) -> None:
        save({n: t * 2 if n.endswith("v_scale") else t for n, t in tensors.items()}, *how, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "save_file", doubled)
    with pytest.raises(MpqError, match="the first of 2 differences: the v scale of model"):
        export(plan_of(source, CACHE), source, tmp_path / "out", check=TEXT)


def test_other_scales_are_not_gone_on_with(
    tmp_path: Path, reloaded_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that another text's scales lie in is written anew."""
    source, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            writing, "scales_of", lambda *how: {n: s / 2 for n, s in scales_of(*how).items()}
        )
        patch.setattr(folder.Aside, "finish", lambda self: None)
        export(plan_of(source, CACHE), source, out, check=TEXT)
    (partial,) = tmp_path.glob(".out*/*.safetensors")
    before = load_file(partial)
    export(plan_of(source, CACHE), source, out, check=TEXT)
    found = load_file(out / "model.safetensors")
    for name in [n for n in found if n.endswith("_scale")]:
        assert found[name] == 2 * before[name]


def test_the_cache_of_a_model_whose_experts_are_decoded(
    tmp_path: Path, reloaded_here: None
) -> None:
    """Experts in INT8, which transformers gets as values, and nothing else lowered but a cache: it is still read."""
    source = write_checkpoint(tmp_path / "model", model_type="qwen3_moe")
    experts = dict.fromkeys(skeleton(load_config(source)).expert_ops, "int8")
    made = export(plan_of(source, {**CACHE, **experts}), source, tmp_path / "out", check=TEXT)
    assert made.check["passed"]
    assert made.check["caches_unread"] == ()


def test_one_pass_measures_inputs_and_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is loaded once for both; what enters a linear, and K and V, are what they are in the model's own run, whichever
    block has the largest."""
    source, loads = checkpoint(tmp_path / "model"), []
    model, op = load_model(source, "bf16"), "model.layers.1.mlp.up_proj"
    seen, entered = Largest(), []
    hook = model.get_submodule(op).register_forward_pre_hook(
        lambda _, x: entered.append(float(x[0].abs().max()))
    )
    with intercept(model, {ATTENTION: seen}), torch.inference_mode():
        for tokens in TEXT.batches(2, "cpu"):
            model(input_ids=tokens, use_cache=False)
    hook.remove()
    monkeypatch.setattr("mpq.models.loading.load_model", lambda *_: loads.append(1) or model)
    for text in (TEXT, Blocks(TEXT.tokens[::-1].copy())):
        found = largest_in(text, {op: "nvfp4"}, Caches((ATTENTION,), (), "fp8_kv"), source, "bf16")
        assert float(found.inputs[op]) == max(entered)
        assert found.caches[ATTENTION].tolist() == seen.seen
    assert loads == [1, 1]
    with pytest.raises(MpqError, match=f"{op} runs in nvfp4, whose activations"):
        largest_in(None, {op: "nvfp4"}, Caches(), source, "bf16")


@pytest.mark.parametrize("kind", list(MORE))
def test_which_attentions_have_a_cache(kind: str) -> None:
    """Those of the decoder's layers, whatever else in them has a configuration of its own."""
    found = skeleton(small_config(kind, **MORE[kind])).attentions
    owner, name = ("gpt_neox", "attention") if kind == "gpt_neox" else ("model", "self_attn")
    assert found == tuple(f"{owner}.layers.{i}.{name}" for i in (0, 1))


SHARED = ["sliding_attention", "full_attention", "full_attention"]


@pytest.mark.parametrize(
    ("kind", "more", "layers"),
    [
        ("deepseek_v3", {}, ()),
        ("gemma4_text", {}, (0, 1)),
        (
            "gemma4_text",
            {"num_hidden_layers": 3, "layer_types": SHARED, "num_kv_shared_layers": 1},
            (),
        ),
        ("granitemoehybrid", {}, (1,)),
        ("phi4_multimodal", {}, (0, 1)),
        ("hrm_text", {}, ()),
    ],
    ids=["a latent", "own keys", "shared keys", "beside mamba", "below encoders", "nested layers"],
)
def test_which_attentions_have_no_cache(
    kind: str, more: dict[str, object], layers: tuple[int, ...]
) -> None:
    """None that keeps a latent, none where one reads another's keys, no encoder's, and none of layers that are in others."""
    found = skeleton(tiny(kind, more)).attentions
    assert found == tuple(f"model.layers.{i}.self_attn" for i in layers)


@pytest.mark.parametrize(
    ("kind", "more", "tensors", "name", "why"),
    [
        ("gpt2", {}, (), "transformer.h.0.attn", "vLLM opens no checkpoint .* called attn"),
        ("gpt_bigcode", {}, (), "transformer.h.0.attn", "vLLM opens no checkpoint"),
        ("bart", {}, (), "model.decoder.layers.0.self_attn", "2 attentions in layer 0 .*encoder_"),
        ("opt", {}, (), "model.decoder.layers.0.self_attn", "does not say num_key_value_heads"),
        ("gemma4_text", {"global_head_dim": 16}, (), "model.layers.0.self_attn", "once for all"),
        ("hrm_text", {}, (), "model.L_module.layers.0.self_attn", "is no attention of the decoder"),
        (
            "inkling2_text",
            {},
            ("model.llm.layers.0.attn.wq_du.weight",),
            "model.layers.0.self_attn",
            "under another name .*wq_du",
        ),
    ],
)
def test_caches_that_no_reader_has_are_refused(
    kind: str, more: dict[str, object], tensors: tuple[str, ...], name: str, why: str
) -> None:
    """In one sentence, whatever vLLM or transformers would stop at, or read otherwise than the plan has it."""
    formats = {f"{name}.{product}": "fp8_kv" for product in PRODUCTS}
    with pytest.raises(MpqError, match=why):
        caches_of(formats, skeleton(tiny(kind, more), tensors), "compressed-tensors", "vllm", True)


def test_what_no_file_or_engine_has_is_refused(tmp_path: Path) -> None:
    """Before anything is written: other engines and forms, K without V, a cache that is not there, and scales without text."""
    source, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    refused: list[tuple[dict[str, str], dict[str, str], str]] = [
        (CACHE, {"engine": "sglang"}, "not to compressed-tensors for sglang"),
        (CACHE, {"engine": "transformers"}, "to compressed-tensors for vllm alone"),
        (CACHE, {"to": "modelopt"}, "not to modelopt for vllm"),
        (CACHE, {}, "whose scales are measured on text before keys and values come"),
        ({f"{ATTENTION}.qk_matmul": "fp8_kv"}, {}, "one of K and V of model.layers.1.self_attn"),
        (
            {f"x.{x}_matmul": "fp8_kv" for x in ("qk", "av")},
            {},
            "of x in fp8_kv, which is no attention of the decoder",
        ),
        ({f"{ATTENTION}.qk_matmul": "fp8_e4m3"}, {}, "which a checkpoint cannot express"),
        ({**CACHE, f"{ATTENTION}.q_proj": "fp8_kv"}, {}, "q_proj is in fp8_kv in this plan"),
        ({"qk_matmul": "fp8_kv", "av_matmul": "fp8_kv"}, {}, "expected it of ATTENTION.qk_matmul"),
    ]
    for formats, how, why in refused:
        with pytest.raises(MpqError, match=why):
            export(plan_of(source, formats), source, out, **how)  # type: ignore[arg-type]
        assert not out.exists()
