"""Whole models in CUDA's kernels: both paths of attention, plans, compiled blocks; on the GPU where there is one, else interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_reference import DEVICE, E4M3, error
from small import MIXTURES, small_model
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("triton", reason="Triton comes for Linux on x86-64 alone")

from mpq.formats.format import get_format
from mpq.kernels import cuda, native_formats
from mpq.models.attention import PlainAttention, intercept
from mpq.running.apply import Mixed, apply_plan
from mpq.running.prefill import blocks


class Spy(cuda.Attention):
    """Counts how its attention was computed."""

    def __init__(self, *formats: Any, fuse: bool = True):
        super().__init__(*formats)
        self.fuse, self.paths = fuse, []  # type: ignore[var-annotated]

    def fused(self, attention: PlainAttention) -> Tensor | None:
        output = super().fused(attention) if self.fuse else None
        self.paths.append("products" if output is None else "fused")
        return output

    def qk(self, query: Tensor, key_t: Tensor) -> Tensor:
        self.paths.append(f"qk {query.shape[1]} {key_t.shape[1]}")
        return super().qk(query, key_t)


def small(name: str, implementation: str, **more: Any) -> torch.nn.Module:
    """A model of one layer with grouped-query attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name,
        hidden_size=64,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        head_dim=16,
        **{"num_hidden_layers": 1, **more},
    )
    model: torch.nn.Module = (
        AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        .to(DEVICE)
        .eval()
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


@pytest.mark.parametrize("padded", [False, True])
def test_both_paths_of_a_model_agree(padded: bool) -> None:
    """In a Llama, fused FP8 attention and FP8 products inside its eager attention give what base gives up to FP8's error, and
    the products meet K and V with their heads not repeated."""
    model = small("llama", "sdpa")
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    inputs = {"input_ids": ids} | ({"attention_mask": padding} if padded else {})
    base = model(**inputs).logits[padding.bool() if padded else torch.ones_like(ids).bool()]
    name, groups = (
        "model.layers.0.self_attn",
        model.get_submodule("model.layers.0.self_attn").num_key_value_groups,
    )
    for formats in ((E4M3, E4M3), (E4M3, None), (None, E4M3), (get_format("fp16"), E4M3)):
        for fuse in (True, False):
            spy = Spy(*formats, fuse=fuse)
            with intercept(model, {name: spy}):
                got = model(**inputs).logits[
                    padding.bool() if padded else torch.ones_like(ids).bool()
                ]
            assert spy.paths == (["fused"] if fuse else ["products", "qk 4 2"])
            assert 1e-5 < error(got, base) < 0.1
    assert model.get_submodule(name).num_key_value_groups == groups == 2


@pytest.mark.parametrize("fuse", [True, False])
def test_both_paths_compile(fuse: bool) -> None:
    """A block with FP8 attention, fused or not, gives the same logits under torch.compile."""
    model = small("llama", "sdpa")
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    handler = cuda.Attention(E4M3, E4M3)
    if not fuse:
        handler.fused = lambda attention: None  # type: ignore[method-assign]
    block = model.get_submodule("model.layers.0")
    with intercept(model, {"model.layers.0.self_attn": handler}), torch.inference_mode():
        want = model(ids).logits
        block.compile(backend="aot_eager", dynamic=False)
        assert error(model(ids).logits, want) < 1e-2


def test_formats_follow_from_the_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8 and BF16 from 8.0, FP8 from 8.9 (Ada) on, four bits from 10.0 (Blackwell); none without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, linear in (
        ((7, 5), ("fp32", "fp16")),
        ((8, 0), ("fp32", "fp16", "bf16", "int8")),
        ((9, 0), ("fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8", "fp8_block")),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert native_formats("cuda:0") == linear
        assert native_formats("cuda", "bgemm") == tuple(
            f for f in linear if f not in ("fp8_e5m2", "int8", "fp8_block")
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert set(native_formats("cuda:0")) - set(linear) == {
        *("mxfp8", "mxfp4", "mxfp4_mse", "nvfp4", "nvfp4_mse")
    }
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert "nvfp4" in native_formats("cuda:0")
    assert "mxfp4" not in native_formats("cuda:0"), "torch multiplies it on a B200 alone"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native_formats("cuda") == ()


def test_a_plan_on_cuda_is_what_emulation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole plan on CUDA's kernels moves the logits as the emulated plan does, with perturbed scales too."""
    model = small("llama", "sdpa")
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: True
    )  # a GPU as far as plans are concerned
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    layer, base = "model.layers.0", model(ids).logits
    plan = {
        f"{layer}.self_attn.{op}": "fp8_e4m3"
        for op in ("q_proj", "v_proj", "qk_matmul", "av_matmul", "o_proj")
    }
    plan |= {
        f"{layer}.mlp.down_proj": "fp8_e4m3",
        f"{layer}.mlp.up_proj": "bf16",
        f"{layer}.mlp.gate_proj": "fp8_block",
        f"{layer}.self_attn.k_proj": "int8",
        "lm_head": "fp8_e4m3",
    }
    for seed in (None, 3):
        with apply_plan(model, plan, base="fp32", backend="emulated", seed=seed):
            want = model(ids).logits
        native = Mixed(model, base="fp32", backend="native", seed=seed)
        native._device = "cuda"
        native.set(plan)
        try:
            got = model(ids).logits
        finally:
            native.clear()
        # one value that falls to the other side of a rounding point moves what is rounded after it
        assert error(got, want) < 0.35 * error(want, base)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_on_cuda_are_what_emulation_says(
    monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Experts in CUDA's products move the logits as emulated ones do, plain, or transposed with biases; and come off bit for bit."""
    model = small_model(model_type, **MIXTURES[model_type]).to(DEVICE)
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    base, experts = model(ids).logits, "model.layers.{}.mlp.experts.{}"
    plan = {
        experts.format(0, "gate_up_proj"): "fp8_e4m3",
        experts.format(0, "down_proj"): "int8",
        experts.format(1, "down_proj"): "fp8_block",
    }
    with apply_plan(model, plan, base="fp32", backend="emulated", seed=3):
        want = model(ids).logits
    native = Mixed(model, base="fp32", backend="native", seed=3)
    native._device = "cuda"
    native.set(plan)
    try:
        got = model(ids).logits
    finally:
        native.clear()
    # one value that falls to the other side of a rounding point moves what is rounded after it
    assert error(got, want) < 0.35 * error(want, base)
    assert torch.equal(model(ids).logits, base)


def test_blocks_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks with FP8 linears and attention are one graph, without a break, as they are in base."""
    model = small("llama", "sdpa", num_hidden_layers=3)
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ops = (
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.down_proj",
        "self_attn.qk_matmul",
        "self_attn.av_matmul",
    )
    mixed = Mixed(model, base="fp32", backend="native")
    mixed._device = "cuda"
    with monkeypatch.context() as a_gpu:
        a_gpu.setattr(torch.cuda, "is_available", lambda: True)
        a_gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        mixed.set({f"model.layers.{i}.{op}": "fp8_e4m3" for i in range(3) for op in ops})
    torch.compiler.reset()
    counters.clear()
    try:
        with torch.inference_mode():
            want = model(ids, use_cache=False).logits
            for block in blocks(model):
                block.compile(backend="aot_eager", dynamic=False)
            assert error(model(ids, use_cache=False).logits, want) < 1e-2
    finally:
        mixed.clear()
        torch.compiler.reset()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_soft_caps_run_as_products() -> None:
    """Gemma 2's soft-capped eager attention keeps its soft cap, with its products in FP8."""
    model = small("gemma2", "eager", attn_logit_softcapping=0.5)
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    base = model(ids).logits
    spy = Spy(E4M3, E4M3)
    with intercept(model, {"model.layers.0.self_attn": spy}):
        got = model(ids).logits
    assert spy.paths == ["qk 4 2"]
    assert 1e-5 < error(got, base) < 0.05


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_plan_runs_on_the_gpu_and_comes_off() -> None:
    """On a GPU a plan in FP8 changes the logits by FP8's error, in eager and in a captured graph alike, and comes off bit for bit."""
    model = small("llama", "sdpa").to(torch.bfloat16)
    ids = torch.randint(1, 97, (2, 9)).to(DEVICE)
    base = model(ids).logits
    attention = "model.layers.0.self_attn"
    plan = {
        f"{attention}.{op}": "fp8_e4m3" for op in ("q_proj", "k_proj", "qk_matmul", "av_matmul")
    } | {"lm_head": "fp8_e4m3"}
    with apply_plan(model, plan, base="bf16", backend="native"), torch.inference_mode():
        eager = model(ids).logits
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(ids)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(ids).logits
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, eager)
    assert 1e-4 < error(eager, base) < 0.15
    assert torch.equal(model(ids).logits, base)
