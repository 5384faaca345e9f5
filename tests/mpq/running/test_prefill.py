"""How one forward is run to be timed: eager or compiled per block, once for each configuration however many blocks there are."""

from __future__ import annotations

import os
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import AutoConfig, masking_utils
from transformers.utils import import_utils

from mpq.caches import private_folder
from mpq.errors import MpqError
from mpq.kernels import int8_attention
from mpq.running.apply import Mixed
from mpq.running.prefill import Prefill, blocks, compiled_blocks
from mpq.timing.measure import measure_ttft, timing_model

CONFIG = AutoConfig.for_model(
    "llama",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=101,
)
WITHOUT_INDUCTOR = partialmethod(nn.Module.compile, backend="aot_eager")
LAYER = "model.layers.{}.self_attn."
PLANS = {
    "int8 and bf16 linears": {"q_proj": "int8", "k_proj": "int8", "o_proj": "bf16"},
    "attention in bf16": {"qk_matmul": "bf16", "av_matmul": "bf16"},
    "one product in bf16": {"qk_matmul": "bf16"},
}
if int8_attention.available():
    PLANS["attention in int8"] = {"qk_matmul": "int8", "av_matmul": "int8"}


def in_every_layer(formats: dict[str, str]) -> dict[str, str]:
    """The formats of one attention's ops, for all three."""
    return {LAYER.format(i) + op: f for i in range(3) for op, f in formats.items()}


def test_what_is_compiled_lies_where_nobody_else_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles into a folder of the temporary one by itself, and runs what it finds there; a folder that is named stays."""
    monkeypatch.setattr(nn.Module, "compile", WITHOUT_INDUCTOR)
    model = timing_model(CONFIG, "fp32")
    for given, used in (
        (None, str(private_folder("inductor"))),
        (default_cache_dir(), str(private_folder("inductor"))),
        ("/mine", "/mine"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
            if given:
                patch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
            with compiled_blocks(model):
                assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == used


def test_a_block_is_compiled_once_for_each_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks are one graph in each configuration, without a break; their logits are those of the eager model.

    The graphs run without inductor, which takes ten seconds for each: what it makes of one is looked at below.
    """
    monkeypatch.setattr(nn.Module, "compile", WITHOUT_INDUCTOR)
    model = timing_model(CONFIG, "fp32")
    tokens = torch.arange(24)[None] % 101
    mixed = Mixed(model, base="fp32", backend="native")
    eager = {}
    with torch.inference_mode():
        for name, plan in {"base": {}, **PLANS}.items():
            mixed.set(in_every_layer(plan))
            eager[name] = model(tokens, use_cache=False).logits
    counters.clear()
    prefill = Prefill(model, 1, 24, compiled=True)
    assert prefill.mode == "compiled"
    with compiled_blocks(model):
        for name, plan in {"base": {}, **PLANS}.items():
            assert prefill.ready(mixed, in_every_layer(plan))() > 0
            with torch.inference_mode():
                logits = model(tokens, use_cache=False).logits
            torch.testing.assert_close(
                logits, eager[name], atol=2e-2 * float(eager[name].abs().max()), rtol=0
            )
        assert counters["stats"]["unique_graphs"] == 1 + len(PLANS)
        assert not counters["graph_break"]
    mixed.clear()
    assert all(block._compiled_call_impl is None for block in blocks(model))


def test_plans_are_timed_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of whole plans says how they ran, and the model comes out as it went in."""
    monkeypatch.setattr(nn.Module, "compile", WITHOUT_INDUCTOR)
    model = timing_model(CONFIG, "fp32")
    plan = in_every_layer(PLANS["int8 and bf16 linears"] | PLANS[next(reversed(PLANS))])
    frame = measure_ttft(model, [plan], base="fp32", batch=1, length=24, repeats=2, compiled=True)
    assert frame["mode"].to_list() == ["compiled"]
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_inductor_keeps_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What inductor makes of a block in several formats computes what it does eager."""
    # it tries the compiler on every vector extension that the CPU has, in a process each: here it believes the CPU
    monkeypatch.setattr(inductor.cpp, "vec_isa_ok", True)
    model = timing_model(
        AutoConfig.for_model(**{**CONFIG.to_dict(), "num_hidden_layers": 1}), "fp32"
    )
    every = in_every_layer(PLANS["int8 and bf16 linears"] | PLANS[next(reversed(PLANS))])
    plan = {op: f for op, f in every.items() if op.startswith(LAYER.format(0))}
    tokens = torch.arange(24)[None] % 101
    mixed = Mixed(model, base="fp32", backend="native")
    with torch.inference_mode():
        mixed.set(plan)
        eager = model(tokens, use_cache=False).logits
        with compiled_blocks(model):
            Prefill(model, 1, 24, compiled=True).ready(mixed, plan)()
            logits = model(tokens, use_cache=False).logits
    # compiled elementwise operations round in another order, and an INT8 code may then be the next one
    torch.testing.assert_close(logits, eager, atol=2e-2 * float(eager.abs().max()), rtol=0)


def test_a_model_without_blocks_cannot_be_compiled() -> None:
    """One sentence, and the model is not touched."""
    with (
        pytest.raises(MpqError, match="no list of repeated blocks"),
        compiled_blocks(nn.Linear(2, 2)),
    ):
        pass


def test_blocks_are_the_outermost_lists() -> None:
    """The layers of a Llama; of a list within a list's entry, only the outer entries."""
    assert len(blocks(timing_model(CONFIG, "fp32"))) == 3
    nested = nn.Sequential(nn.ModuleList([nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])]))
    assert len(blocks(nested)) == 1


def test_a_captured_base_attends_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a CUDA graph is captured, as while eager, SDPA gets no mask: that of a causal model keeps it from FlashAttention."""
    model = timing_model(CONFIG, "fp32")
    masks: list[object] = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, attn_mask=None, **more: (
            masks.append(attn_mask) or attend(*args, attn_mask=attn_mask, **more)
        ),
    )
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    Prefill(model, 2, 24).ready(Mixed(model, base="fp32", backend="native"), {})()
    assert masks == [None] * 2 * len(model.model.layers)
    masks.clear()
    with torch.inference_mode():
        model(torch.arange(24)[None] % 101, use_cache=False)
    assert masks[0] is not None  # what it would be otherwise
    found = masking_utils.find_packed_sequence_indices, masking_utils.is_tracing
    assert [f.__module__ for f in found] == [
        "transformers.masking_utils",
        "transformers.utils.import_utils",
    ]
