"""What the traced graph knows besides groups: who reads an output, what a weight takes; and what cannot be traced or lowered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from small import small_config, small_model
from test_partition import BY_HAND, GQA
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from mpq.errors import MpqError
from mpq.evaluation.losses import losses
from mpq.loss.sensitivity import measure_sensitivity
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import load_config
from mpq.models.graph import trace
from mpq.models.partition import feeds_of, groups_table, partition
from mpq.program.gains import gains_m
from mpq.running.apply import apply_plan


def test_what_cannot_be_traced_is_told() -> None:
    """A configuration of something that is no language model is one sentence."""
    with pytest.raises(MpqError, match=r"cannot be traced .*\.$"):
        trace(small_config("vit"))


FEEDS = {
    "llama": {
        "self_attn.v_proj": ["self_attn.av_matmul"],
        "self_attn.av_matmul": ["self_attn.o_proj"],
    },
    "gpt2": {
        "attn.c_attn": ["attn.av_matmul", "attn.qk_matmul"],
        "attn.av_matmul": ["attn.c_proj"],
    },
    "gpt_neox": {"attention.av_matmul": ["attention.dense"]},
}


@pytest.mark.parametrize("name", FEEDS)
def test_who_reads_an_output_as_it_is(name: str) -> None:
    """What is only moved about between two products is told, by hand; rotated queries, activations and residuals are not."""
    further, (layers, _, _) = BY_HAND[name]
    groups = groups_table(partition(trace(small_config(name, **further))), 1, 8)
    for i in range(2):
        prefix = f"{layers}.{i}."
        found = {op: readers for op, readers in feeds_of(groups).items() if op.startswith(prefix)}
        assert found == {
            prefix + op: tuple(prefix + r for r in readers) for op, readers in FEEDS[name].items()
        }
    assert feeds_of(groups.drop("feeds")) == {}


EXPERTS_OF = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


CHOSEN_IN_GROUPS = {
    **EXPERTS_OF,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


# architecture → further configuration, what is `other` in the last layer
IN_PART: dict[str, tuple[dict[str, object], str]] = {
    "mixtral": ({**GQA, "num_local_experts": 4}, "mlp.gate"),
    "qwen2_moe": (
        {**GQA, **EXPERTS_OF, "num_experts": 4, "shared_expert_intermediate_size": 16},
        "mlp.gate",
    ),
    "qwen3_moe": ({**GQA, **EXPERTS_OF, "num_experts": 4}, "mlp.gate"),
    "deepseek_v3": ({**CHOSEN_IN_GROUPS, **LATENT, "num_key_value_heads": 4}, "mlp.gate"),
    "glm4_moe": ({**CHOSEN_IN_GROUPS, **GQA}, "mlp.gate"),
    "gpt_oss": ({**GQA, "num_local_experts": 4, "num_experts_per_tok": 2}, "mlp.router"),
    "llama4_text": (
        {**GQA, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 32},
        "feed_forward.router",
    ),
    "phimoe": ({**GQA, "num_local_experts": 4, "num_experts_per_tok": 2}, "mlp.router"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "self_attention.matmul2"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "attn.matmul2"),
    "codegen": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "attn.matmul2"),
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "attn.matmul2"),
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "attn.attention.matmul2",
    ),
    "xglm": (
        {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
        "self_attn.matmul2",
    ),
}


@pytest.mark.parametrize("model_type", IN_PART)
def test_what_cannot_be_lowered_stops_nothing_else(model_type: str) -> None:
    """Routers, experts and attention of a kind of its own are named and stay in base; every linear is measured and lowered."""
    more, other = IN_PART[model_type]
    ops = [
        op for g in partition(trace(small_config(model_type, **more), length=16)) for op in g.ops
    ]
    kinds = {op.name: op.kind for op in ops}
    assert len(kinds) == len(ops)
    assert any(name.endswith(f".1.{other}") and kinds[name] == "other" for name in kinds)
    model = small_model(model_type, **more)
    linears = {n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    assert {name for name, kind in kinds.items() if kind == "linear"} == linears
    lowered = [(name, kind) for name, kind in kinds.items() if kind != "other"]
    blocks = Blocks(np.random.default_rng(0).integers(5, 97, (2, 12)))
    frame, _ = measure_sensitivity(model, lowered, blocks, formats=["fp8_e4m3"], base="fp32")
    assert set(frame["op"]) == {name for name, _ in lowered}
    before = losses(model, blocks)
    plan = {name: "fp32" if kind == "other" else "fp8_e4m3" for name, kind in kinds.items()}
    with apply_plan(model, plan, base="fp32", seed=0):
        assert not np.array_equal(losses(model, blocks), before)


def test_a_state_space_model_without_heads() -> None:
    """Mamba's configuration names no heads: its scan is `other`, its linears are linears."""
    config = AutoConfig.for_model(
        "mamba", vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4
    )
    kinds = {op.name: op.kind for g in partition(trace(config, length=4)) for op in g.ops}
    assert kinds["backbone.layers.0.mixer.in_proj"] == "linear"
    assert set(kinds.values()) == {"linear", "other"}


@pytest.mark.parametrize("tied", [True, False])
def test_memory_counts_a_tied_head_as_a_copy_more(tied: bool) -> None:
    """Lowering a head that shares the embedding's weight adds a copy; memory saved is what the parameters really take."""
    config = small_config("llama", **GQA, tie_word_embeddings=tied)
    groups = groups_table(partition(trace(config)), 1, 8)
    ops = groups["op"].to_list()
    sensitivity = pl.DataFrame(
        {"op": ops, "format": "int8", "noise_model": "ulp", "loss_mse": 1e-9}
    )
    gains = gains_m(groups, sensitivity, ["int8"], "bf16", "ulp")
    promised = sum(g for c, g in gains.select("configuration", "gain").iter_rows() if c == ["int8"])
    model = small_model("llama", **GQA, tie_word_embeddings=tied)
    before = sum(2 * p.numel() for p in model.parameters())
    scales = 0
    for name, module in model.named_modules():
        if name in ops:  # its weight is kept in one byte; who else holds it keeps what it had
            module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
            scales += 4 * module.out_features  # FP32, one for each output channel
    after = scales + sum(
        p.numel() * (1 if p.dtype == torch.int8 else 2) for p in model.parameters()
    )
    assert promised == before - after
    assert groups.filter(pl.col("op") == "lm_head")["tied"].to_list() == [tied]


@pytest.mark.parametrize(("field", "value"), [("num_hidden_layers", 10**6), ("n_layer", 10**7)])
def test_layers_by_the_million_are_told(field: str, value: int, tmp_path: Path) -> None:
    """A configuration whose trace would never end is one sentence, before anything is built."""
    kind = "gpt2" if field == "n_layer" else "qwen2"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, field: value}))
    with pytest.raises(MpqError, match=f"{field} = {value}"):
        load_config(tmp_path)
