"""Experts in a format: what their products become, natively and emulated, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small import MIXTURES, small_config, small_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mpq.errors import MpqError
from mpq.formats.scheme import get_scheme
from mpq.kernels import emulated, runs_natively
from mpq.models.experts import dispatched, intercept_experts, products_of
from mpq.models.graph import trace
from mpq.models.partition import groups_table, partition
from mpq.program.memory import bytes_of
from mpq.running.apply import apply_plan, kind_of
from mpq.running.prefill import blocks
from mpq.timing.measure import measure, timing_model

IDS = torch.randint(5, 97, (2, 12), generator=torch.Generator().manual_seed(1))


def ops_of(model: nn.Module) -> list[str]:
    return [f"{n}.{p}" for n, m in model.named_modules() if dispatched(m) for p in products_of(m)]


def int8(x: Tensor) -> Tensor:
    """Rows rounded to INT8 by numpy, a scale for each."""
    a = x.detach().numpy()
    scale = np.abs(a).max(-1, keepdims=True).astype(np.float32) / np.float32(127)
    return torch.from_numpy(np.rint(a / scale).astype(np.float32) * scale)


def by_loops(module: Any, lowered: set[str]) -> Any:
    """The experts' forward token by token, with the operands of the products in `lowered` rounded by numpy."""

    def product(name: str, x: Tensor, expert: int) -> Tensor:
        weight = getattr(module, name)[expert]
        weight = weight.T if module.is_transposed else weight
        if name in lowered:
            x, weight = int8(x[None])[0], int8(weight.contiguous())
        return weight @ x + (getattr(module, f"{name}_bias")[expert] if module.has_bias else 0)

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        first, second = products_of(module)
        for token, experts in enumerate(chosen.tolist()):
            for choice, expert in enumerate(experts):
                y = product(first, hidden[token], expert)
                y = product(second, module._apply_gate(y[None])[0], expert)
                out[token] += weights[token, choice] * y
        return out

    return forward


@pytest.mark.parametrize("backend", ["emulated", "native"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("lowered", [{"gate_up_proj"}, {"down_proj", "gate_up_proj"}])
def test_experts_are_rounded_like_linears(model_type: str, backend: Any, lowered: set[str]) -> None:
    """Lowered experts are those of numpy's rounding, a scale a token and one an output channel of each expert; taken off,
    the model's logits are the same bits."""
    model = small_model(model_type, **MIXTURES[model_type])
    before = model(IDS).logits
    formats = {op: "int8" for op in ops_of(model) if op.rpartition(".")[2] in lowered}
    with apply_plan(model, formats, base="fp32", backend=backend):
        found = model(IDS).logits
    assert torch.equal(model(IDS).logits, before)
    for module in (m for m in model.modules() if dispatched(m)):
        module.forward = by_loops(module, lowered)
    wanted = model(IDS).logits
    assert not torch.allclose(found, before, atol=1e-3)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("scheme", ["fp8_block", "nvfp4a16", "w4a16_g32", "w4a8"])
def test_each_expert_has_blocks_and_scales_of_its_own(scheme: str) -> None:
    """In schemes of blocks, and of a scale for a whole weight, experts of other magnitudes do not share one: each is as a linear
    of its own; and its scales are counted so."""
    model = small_model("mixtral", **MIXTURES["mixtral"])
    modules = [m for m in model.modules() if dispatched(m)]
    for module in modules:
        for product in products_of(module):
            getattr(module, product).data *= 4.0 ** torch.arange(4)[:, None, None]
    with apply_plan(model, dict.fromkeys(ops_of(model), scheme), base="fp32"):
        found = model(IDS).logits
    for module in modules:
        linears = {
            p: [emulated.linear(w, None, get_scheme(scheme)) for w in getattr(module, p)]
            for p in products_of(module)
        }

        def forward(
            hidden: Tensor, chosen: Tensor, weights: Tensor, of: Any = linears, m: Any = module
        ) -> Tensor:
            out = torch.zeros_like(hidden)
            for expert in range(4):
                rows, choice = torch.where(chosen == expert)
                y = m._apply_gate(of["gate_up_proj"][expert](hidden[rows]))
                y = of["down_proj"][expert](y) * weights[rows, choice, None]
                out.index_add_(0, rows, y)
            return out

        module.forward = forward
    torch.testing.assert_close(found, model(IDS).logits, atol=1e-3, rtol=1e-3)
    op = {"kind": "experts", "in_features": 32, "out_features": 96, "parameters": 4 * 96 * 32}
    alone = {**op, "kind": "linear", "parameters": 96 * 32}
    assert bytes_of(op, scheme, "bf16") == 4 * bytes_of(alone, scheme, "bf16")


@pytest.mark.parametrize("backend", ["emulated", "native"])
def test_experts_are_taken_off_after_an_error(backend: Any) -> None:
    """What fails inside leaves no attribute behind; a seed draws other scales for each op."""
    model = small_model("qwen3_moe", **MIXTURES["qwen3_moe"])
    state = {name: sorted(m.__dict__) for name, m in model.named_modules()}
    plan = dict.fromkeys(ops_of(model), "int8")
    with apply_plan(model, plan, base="fp32", backend=backend):
        plain = model(IDS).logits
    with (
        pytest.raises(RuntimeError, match="boom"),
        apply_plan(model, plan, base="fp32", backend=backend),
    ):
        raise RuntimeError("boom")
    assert {name: sorted(m.__dict__) for name, m in model.named_modules()} == state
    with apply_plan(model, plan, base="fp32", backend=backend, seed=1):
        assert not torch.equal(model(IDS).logits, plain)


def test_the_eager_implementation_has_the_seam_too() -> None:
    """A model that loops over its experts computes through the seam what it did, to the last bits' sums."""
    model = small_model("mixtral", **MIXTURES["mixtral"])
    model.set_experts_implementation("eager")
    before = model(IDS).logits
    names = [n for n, m in model.named_modules() if dispatched(m)]
    with intercept_experts(model, {name: {} for name in names}):
        torch.testing.assert_close(model(IDS).logits, before)


def test_what_is_no_experts_module_is_told() -> None:
    """Products for a module without experts are refused by name; a device without their kernel is said to have none."""
    model = small_model("llama", num_key_value_heads=2)
    with (
        pytest.raises(MpqError, match=r"model\.layers\.0\.mlp"),
        intercept_experts(model, {"model.layers.0.mlp": {}}),
    ):
        pass
    op = "model.layers.0.mlp.experts.down_proj"
    assert runs_natively({op: "int8"}, {op: "experts"}, "fp32", "cpu")
    assert not runs_natively({op: "nvfp4"}, {op: "experts"}, "fp32", "cuda")


def test_kinds_are_told_from_the_model() -> None:
    """An op's kind is known by its name in the model, for plans that come without a groups table."""
    model = small_model("qwen2_moe", **MIXTURES["qwen2_moe"])
    groups = groups_table(
        partition(trace(small_config("qwen2_moe", **MIXTURES["qwen2_moe"]))), 1, 8
    )
    for op, kind in groups.select("op", "kind").iter_rows():
        assert kind_of(model, op) == kind
    assert kind_of(model, "model.layers.7.mlp.experts.down_proj") is None


def test_experts_are_timed() -> None:
    """A group of experts has a time in each native configuration, beside base."""
    config = small_config("mixtral", **MIXTURES["mixtral"])
    groups = groups_table(partition(trace(config)), 2, 16)
    signature = next(s for s in groups["signature"] if s.startswith("gate_up_proj+down_proj"))
    model = timing_model(config, "fp32")
    timing = measure(
        model,
        groups,
        [(signature, [("fp32", "fp32"), ("int8", "bf16")])],
        base="fp32",
        batch=2,
        length=16,
        repeats=2,
    )
    assert timing["configuration"].to_list() == [["fp32", "fp32"], ["int8", "bf16"]]
    assert (timing["ttft_s"] > 0).all()
    assert timing["instances"].to_list() == [2, 2]


def test_compiled_blocks_run_experts_of_any_number_of_tokens() -> None:
    """Under torch.compile experts are lowered natively without a version for each number of tokens that one gets."""
    model = small_model("mixtral", **MIXTURES["mixtral"])
    plan = dict.fromkeys(ops_of(model), "int8")
    torch.compiler.reset()
    many = torch._dynamo.config.patch(recompile_limit=4096, accumulated_recompile_limit=4096)
    with apply_plan(model, plan, base="fp32", backend="native"), many:
        wanted = model(IDS).logits
        for block in blocks(model):
            block.compile(
                dynamic=False, backend="eager"
            )  # the same guards, and no code to wait for
        torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-4, rtol=1e-4)
        counters.clear()
        model((IDS * 7 + 3) % 97)
        assert not counters["stats"].get("unique_graphs")
    torch.compiler.reset()
