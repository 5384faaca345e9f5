"""Plans on small models: what changes, what must not, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mpq.errors import MpqError
from mpq.formats.format import get_format
from mpq.kernels import int8_attention
from mpq.running.apply import Mixed, apply_plan
from mpq.running.attention import perturbation

LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "tie_word_embeddings": True,
}
GPT2: dict[str, Any] = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 101,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
IDS = torch.randint(1, 101, (2, 9), generator=torch.Generator().manual_seed(1))
ATTENTION = "model.layers.0.self_attn"
EVERYTHING = {
    "model.layers.0.self_attn.q_proj": "fp8_e4m3",
    "model.layers.0.self_attn.qk_matmul": "int8",
    "model.layers.0.self_attn.av_matmul": "fp8_e5m2",
    "model.layers.1.mlp.down_proj": "int8",
    "lm_head": "fp8_e4m3",
}


def small(name: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(LLAMA if name == "llama" else GPT2))
    model: nn.Module = (
        AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    )
    return model


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(IDS).logits
    return result


def state(model: nn.Module) -> dict[str, list[str]]:
    """Every attribute name on every module: what a replacement would leave behind."""
    return {name: sorted(module.__dict__) for name, module in model.named_modules()}


def e4m3(x: Tensor, axis: int = -1) -> Tensor:
    """Row-wise scaled E4M3 by ml_dtypes, an implementation that is not torch's."""
    a = x.detach().numpy()
    scale = np.abs(a).max(axis=axis, keepdims=True).astype(np.float32) / np.float32(448)
    return torch.from_numpy((a / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale)


@pytest.mark.parametrize(
    ("backend", "base"),
    [("emulated", "fp32"), ("emulated", "bf16"), ("native", "fp32"), ("native", "bf16")],
)
def test_applied_and_taken_off(backend: Any, base: str) -> None:
    """Inside the context the logits change; outside they are the same bits, with no attribute behind, error or not."""
    model = small(dtype=torch.float32 if base == "fp32" else torch.bfloat16)
    formats = EVERYTHING
    if backend == "native":
        formats = {
            op: ("fp32" if base == "bf16" else "bf16") if "matmul" in op else "int8"
            for op in EVERYTHING
        }
    before, attributes = logits(model), state(model)
    embedding = model.get_input_embeddings().weight.detach().clone()
    with apply_plan(model, formats, base=base, backend=backend):
        assert not torch.equal(logits(model), before)
        assert logits(model).dtype == before.dtype
    assert torch.equal(logits(model), before)
    with (
        pytest.raises(RuntimeError, match="boom"),
        apply_plan(model, formats, base=base, backend=backend),
    ):
        raise RuntimeError("boom")
    assert torch.equal(logits(model), before)
    assert state(model) == attributes
    assert torch.equal(model.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize(
    ("name", "op"), [("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")]
)
def test_a_lowered_linear_is_the_rounded_product_and_nothing_else_changes(
    name: str, op: str
) -> None:
    """One linear in E4M3 gives x and W rounded by ml_dtypes; what comes before it is bit-identical (Conv1D too)."""
    model = small(name)
    module = model.get_submodule(op)
    seen: list[tuple[Tensor, Tensor]] = []
    module.register_forward_hook(lambda _, args, out: seen.append((args[0].clone(), out.clone())))
    logits(model)
    with apply_plan(model, {op: "fp8_e4m3"}, base="fp32"):
        logits(model)
    (x, _), (x_lowered, y) = seen
    assert torch.equal(x, x_lowered)
    weight = module.weight if name == "llama" else module.weight.t()
    want = e4m3(x).double() @ e4m3(weight.contiguous()).double().T + (
        0 if module.bias is None else module.bias.double()
    )
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6)


def test_a_lowered_product_is_the_rounded_attention() -> None:
    """One layer's qk in E4M3 equals attention written out in float64 with Q and K rounded by ml_dtypes."""
    model = small()
    attention = model.get_submodule(ATTENTION)
    seen: dict[str, Tensor] = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        attention.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out.clone()})
        )
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(out=args[0].clone()))
    with apply_plan(model, {f"{ATTENTION}.qk_matmul": "fp8_e4m3"}, base="fp32"):
        logits(model)
    q, k, v = (seen[n].view(2, 9, -1, 16).transpose(1, 2) for n in ("q_proj", "k_proj", "v_proj"))
    angle = torch.arange(9)[:, None] * 10000.0 ** (-torch.arange(8) / 8)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    scores = (
        e4m3(rotate(q)).double()
        @ e4m3(rotate(k)).double().repeat_interleave(2, 1).transpose(-1, -2)
        / 4
    )
    scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    want = (
        (scores.softmax(-1) @ v.double().repeat_interleave(2, 1)).transpose(1, 2).reshape(2, 9, 64)
    )
    torch.testing.assert_close(seen["out"].double(), want, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("lowered", [("qk_matmul",), ("av_matmul",), ("qk_matmul", "av_matmul")])
def test_fused_attention_is_emulated_as_eager_attention(lowered: tuple[str, ...]) -> None:
    """A model on SDPA and one on its own eager attention, every attention lowered: logits equal up to the order of sums, far
    closer than the plan moves them; twice the same bits."""
    model = small()
    formats = {
        f"model.layers.{i}.self_attn.{product}": "fp8_e5m2" for i in range(2) for product in lowered
    }
    before = logits(model)
    results = []
    for implementation in ("sdpa", "sdpa", "eager"):
        model.set_attn_implementation(implementation)  # type: ignore[operator]
        with apply_plan(model, formats, base="fp32", seed=0):
            results.append(logits(model))
    fused, again, eager = results
    assert torch.equal(fused, again)
    assert (fused - eager).norm() < 0.1 * (eager - before).norm()


def test_switching_keeps_kernels_and_forgets_plans() -> None:
    """Mixed gives the same logits for a plan before and after another, from the same prepared kernel; base is base."""
    model = small()
    before = logits(model)
    mixed = Mixed(model, base="fp32")
    first = {"lm_head": "fp8_e4m3", f"{ATTENTION}.av_matmul": "int8"}
    mixed.set(first)
    want, kernel = logits(model), model.lm_head.forward
    mixed.set({"model.layers.1.mlp.up_proj": "int8"})
    assert mixed.formats == {"model.layers.1.mlp.up_proj": "int8"}
    assert not torch.equal(logits(model), want)
    mixed.set(first)
    assert model.lm_head.forward is kernel
    assert torch.equal(logits(model), want)
    mixed.set({"lm_head": "FP32"})
    assert mixed.formats == {}
    assert torch.equal(logits(model), before)
    mixed.set(
        {"model.layers.0.mlp.bmm": "fp32"}
    )  # a product of another kind may be in a plan, in base
    assert mixed.formats == {}
    mixed.clear()


def test_seeds_draw_other_errors_of_the_same_size() -> None:
    """A seed repeats itself, another differs, and the error of the logits keeps its size within a factor of two."""
    model = small()
    base = logits(model)

    def error(seed: int | None) -> Tensor:
        with apply_plan(model, EVERYTHING, base="fp32", seed=seed):
            return logits(model) - base

    errors = [error(seed) for seed in (None, 0, 1)]
    assert torch.equal(error(0), errors[1])
    assert not torch.equal(errors[1], errors[2])
    sizes = [float(e.std()) for e in errors]
    assert max(sizes) < 2 * min(sizes)


def test_perturbation_depends_on_its_op_alone_and_never_clips() -> None:
    """Multipliers are at least 1, below 2 for floats and 1.05 for integers, and 1 where there is no scale."""
    fp8, int8 = get_format("fp8_e4m3"), get_format("int8")
    floats = [perturbation(seed, "a", "input", fp8) for seed in range(500)]
    assert 1 <= min(floats) < 1.05
    assert 1.95 < max(floats) < 2
    assert all(1 <= perturbation(seed, "a", "input", int8) < 1.05 for seed in range(100))
    assert (
        perturbation(3, "a", "input", get_format("bf16"))
        == perturbation(None, "a", "input", fp8)
        == 1
    )
    assert perturbation(3, "a", "input", fp8) != perturbation(3, "b", "input", fp8)


@pytest.mark.skipif(
    not int8_attention.available(),
    reason="this CPU has no AVX512-VNNI, or there is no C++ compiler",
)
@pytest.mark.parametrize("products", [("qk_matmul",), ("av_matmul",), ("qk_matmul", "av_matmul")])
def test_native_int8_attention_is_the_emulated_one(products: tuple[str, ...]) -> None:
    """One product in INT8 (beside eager attention) or both (a fused kernel): the logits are those that emulation predicts."""
    model = small()
    plan = {
        f"model.layers.{i}.self_attn.{product}": "int8" for i in range(2) for product in products
    }
    got = {}
    for backend in ("native", "emulated"):
        with apply_plan(model, plan, base="fp32", backend=backend):  # type: ignore[arg-type]
            got[backend] = logits(model)
    away = (got["emulated"] - logits(model)).norm()
    assert 0 < (got["native"] - got["emulated"]).norm() < 0.05 * away


def dtypes(
    model: nn.Module, plan: dict[str, str], feeds: dict[str, tuple[str, ...]]
) -> tuple[Tensor, list[torch.dtype]]:
    """Logits under a native plan, and what the first layer's v_proj and o_proj return and o_proj reads."""
    seen: list[torch.dtype] = []
    names = (f"{ATTENTION}.v_proj", f"{ATTENTION}.o_proj")
    hooks = [
        model.get_submodule(n).register_forward_hook(
            lambda _, a, out: seen.extend([a[0].dtype, out.dtype])
        )
        for n in names
    ]
    with apply_plan(model, plan, base="fp32", backend="native", feeds=feeds):
        result = logits(model)
    for hook in hooks:
        hook.remove()
    return result, seen[1:]


@pytest.mark.parametrize("o_proj", ["bf16", "int8"])
def test_neighbours_in_bf16_are_not_cast_in_between(o_proj: str) -> None:
    """V goes to the attention and its output to the next linear in BF16, the same numbers as with casts; where a reader is
    not lowered, FP32 comes back."""
    model = small()
    feeds = {
        f"{ATTENTION}.v_proj": (f"{ATTENTION}.av_matmul",),
        f"{ATTENTION}.av_matmul": (f"{ATTENTION}.o_proj",),
    }
    full, half = torch.float32, torch.bfloat16
    plan = {f"{ATTENTION}.{op}": "bf16" for op in ("v_proj", "qk_matmul", "av_matmul")}
    for lowered, expected in (
        ({**plan, f"{ATTENTION}.o_proj": o_proj}, [half, half, full]),
        (plan, [half, full, full]),
        (
            {op: f for op, f in plan.items() if "qk" not in op} | {f"{ATTENTION}.o_proj": o_proj},
            [full, full, full],
        ),
    ):
        want, _ = dtypes(model, lowered, {})
        got, seen = dtypes(model, lowered, feeds)
        assert seen == expected
        assert torch.equal(got, want)


def test_a_plan_for_another_model_is_refused() -> None:
    """Unknown ops, modules that are no linears and formats without a kernel are MpqErrors that change nothing."""
    model = small()
    before = logits(model)
    for formats, backend, message in (
        ({"model.layers.7.mlp.up_proj": "int8"}, "emulated", r"no op model\.layers\.7"),
        ({"model.norm": "int8"}, "emulated", r"no op model\.norm"),
        ({f"{ATTENTION}.qq_matmul": "int8"}, "emulated", "no op"),
        ({"lm_head": "fp8_e4m3"}, "native", "fp32, bf16, int8"),
        ({f"{ATTENTION}.qk_matmul": "fp8_e5m2"}, "native", "can run fp32, bf16"),
        ({"lm_head": "int9"}, "emulated", "Unknown format"),
        ({"model.layers.0.mlp.bmm": "int8"}, "emulated", "no op"),
        ({"model.layers.9.mlp.bmm": "fp32"}, "emulated", "no op"),
    ):
        with (
            pytest.raises(MpqError, match=message),
            apply_plan(model, formats, base="fp32", backend=backend),
        ):  # type: ignore[arg-type]
            pass
    with pytest.raises(MpqError, match="load the model in bf16"):
        Mixed(model, base="bf16", backend="native")
    assert torch.equal(logits(model), before)
