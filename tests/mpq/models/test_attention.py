"""The attention seam against Transformers' own implementations, over architectures that differ in attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mpq.errors import MpqError
from mpq.models.attention import AttentionHandler, PlainAttention, intercept

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "pad_token_id": 0,
}
DECODER = {**SMALL, "intermediate_size": 96, "max_position_embeddings": 64}
GQA = {**DECODER, "num_key_value_heads": 2, "head_dim": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "mistral": {**GQA, "sliding_window": 5},
    "gemma2": {
        **GQA,
        "sliding_window": 5,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
    },
    "gpt_neox": DECODER,
    "qwen3": GQA,
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 101,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "opt": {**SMALL, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64},
    "bert": DECODER,
    "gpt_oss": {**GQA, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
}
SINGLE = ("gemma2", "gpt_oss")  # no SDPA: soft caps, sinks


def small_model(name: str, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    auto = AutoModel if name == "bert" else AutoModelForCausalLM
    config = AutoConfig.for_model(name, **CONFIGS[name])
    return auto.from_config(config, attn_implementation=implementation).eval()


def attention_names(model: nn.Module) -> list[str]:
    """The modules that the attention interface is called with, seen by calling it."""
    names = [
        n
        for n, m in model.named_modules()
        if type(m).__name__.endswith("Attention") and hasattr(m, "config")
    ]
    return [n for n in names if n.rsplit(".", 1)[-1] in ("self_attn", "attn", "attention", "self")]


def batch(length: int = 12) -> dict[str, Tensor]:
    """Two sequences, the second padded on the left by three tokens."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :3] = 0
    return {
        "input_ids": torch.randint(1, 101, (2, length), generator=torch.Generator().manual_seed(1)),
        "attention_mask": mask,
    }


@torch.inference_mode()
def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(**inputs)[0]
    return result


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
def test_idle_handlers_equal_eager_bit_for_bit(name: str, padded: bool) -> None:
    """Handlers that do nothing give the eager model's own output, whichever implementation the model is configured with."""
    inputs = batch() if padded else {"input_ids": batch()["input_ids"]}
    want = output(small_model(name, "eager"), inputs)
    real = inputs["attention_mask"].bool() if padded else torch.ones(2, 12, dtype=torch.bool)
    for implementation in ("eager",) if name in SINGLE else ("eager", "sdpa"):
        model = small_model(name, implementation)
        before = output(model, inputs)
        names = attention_names(model)
        assert len(names) == 2
        with intercept(model, {n: AttentionHandler() for n in names}):
            got = output(model, inputs)
        # a padding token attends nowhere: what SDPA and eager answer there differs, and nobody reads it
        assert torch.equal(got[real], want[real])
        torch.testing.assert_close(got[real], before[real], rtol=1e-4, atol=1e-5)
        assert torch.equal(output(model, inputs), before)


class Whole(AttentionHandler):
    """The whole attention in float64, from its definition."""

    def fused(self, attention: PlainAttention) -> Tensor:
        a, heads = attention, attention.query.shape[1] // attention.key.shape[1]
        key, value = (t.double().repeat_interleave(heads, 1) for t in (a.key, a.value))
        scores = a.scaling * a.query.double() @ key.transpose(-1, -2)
        if a.mask is not None:
            scores = (
                scores.masked_fill(~a.mask, -1e30)
                if a.mask.dtype == torch.bool
                else scores + a.mask
            )
        if a.causal:
            scores = scores.masked_fill(
                torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf
            )
        return (scores.softmax(-1) @ value).transpose(1, 2).to(a.query.dtype)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in SINGLE])
@pytest.mark.parametrize("padded", [False, True])
def test_a_fused_kernel_is_told_all_of_the_attention(name: str, padded: bool) -> None:
    """Attention computed from its definition alone, with the mask and scale that a handler is given, is what SDPA computes."""
    inputs = batch() if padded else {"input_ids": batch()["input_ids"]}
    real = inputs["attention_mask"].bool() if padded else torch.ones(2, 12, dtype=torch.bool)
    model = small_model(name, "sdpa")
    want = output(model, inputs)
    with intercept(model, {n: Whole() for n in attention_names(model)}):
        torch.testing.assert_close(output(model, inputs)[real], want[real], rtol=1e-4, atol=1e-5)


class Recorder(AttentionHandler):
    """Records the shapes that pass, and doubles the probabilities."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.shapes |= {"q": tuple(query.shape), "k": tuple(key.shape), "v": tuple(value.shape)}
        return query, key, value

    def probabilities(self, p: Tensor) -> Tensor:
        self.shapes["p"] = tuple(p.shape)
        torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:-1]))
        return 2 * p


def test_handler_sees_unrepeated_heads_and_changes_probabilities() -> None:
    """Operands arrive before repetition, and P doubled is the attention's output doubled."""
    model = small_model("llama", "sdpa")
    attention = model.get_submodule("model.layers.0.self_attn")
    seen: list[Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    recorder = Recorder()
    output(model, batch())
    with intercept(model, {"model.layers.0.self_attn": recorder}):
        output(model, batch())
    assert recorder.shapes == {
        "q": (2, 4, 12, 16),
        "k": (2, 2, 12, 16),
        "v": (2, 2, 12, 16),
        "p": (2, 4, 12, 12),
    }
    real = batch()["attention_mask"].bool()
    torch.testing.assert_close(seen[1][real], 2 * seen[0][real])


def test_products_can_be_replaced() -> None:
    """A handler's own products stand in for torch.matmul, and are not themselves intercepted."""

    class Ours(AttentionHandler):
        def qk(self, query: Tensor, key_t: Tensor) -> Tensor:
            return torch.einsum("bhtd,bhds->bhts", query, key_t)

        def av(self, p: Tensor, value: Tensor) -> Tensor:
            return (p.double() @ value.double()).float()

    model = small_model("mistral", "sdpa")
    want = output(model, batch())
    with intercept(model, {n: Ours() for n in attention_names(model)}):
        got = output(model, batch())
    real = batch()["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)


def test_modules_without_a_handler_keep_the_causal_fast_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one layer intercepted the other still calls fused SDPA, causal and without a mask."""
    model = small_model("llama", "sdpa")
    calls: list[tuple[bool, bool]] = []
    real: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((kwargs["attn_mask"] is None, kwargs["is_causal"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    inputs = {"input_ids": batch()["input_ids"]}
    with intercept(model, {"model.layers.1.self_attn": AttentionHandler()}):
        output(model, inputs)
    assert calls == [(True, True)]


def test_dtype_runs_the_configured_attention_in_that_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler with a dtype calls fused SDPA once, in BF16 operands, and returns FP32."""
    model = small_model("llama", "sdpa")
    seen: list[torch.dtype] = []
    real: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query.dtype)
        return real(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    handler = AttentionHandler()
    handler.dtype = torch.bfloat16
    want = output(model, batch())
    with intercept(model, {"model.layers.0.self_attn": handler}):
        got = output(model, batch())
    assert seen[2:] == [torch.bfloat16, torch.float32]
    assert got.dtype == torch.float32
    mask = batch()["attention_mask"].bool()
    torch.testing.assert_close(got[mask], want[mask], rtol=0.05, atol=0.02)


def test_everything_is_restored_after_an_error() -> None:
    """An exception inside nested contexts leaves the configuration object and the outputs as they were."""
    model = small_model("llama", "sdpa")
    before = output(model, batch())
    config = model.config
    name = "model.layers.0.self_attn"
    outer, inner = (
        intercept(model, {name: AttentionHandler()}),
        intercept(model, {name: Recorder()}),
    )
    with pytest.raises(RuntimeError, match="boom"), outer, inner:
        raise RuntimeError("boom")
    assert all(m.config is config for n, m in model.named_modules() if n.endswith("self_attn"))
    assert config._attn_implementation == "sdpa"
    assert torch.equal(output(model, batch()), before)


def test_gradients_flow_through_the_seam() -> None:
    """Gradients of the intercepted model equal the eager model's."""
    inputs = {"input_ids": batch()["input_ids"]}
    grads = []
    for implementation in ("eager", "sdpa"):
        model = small_model("qwen3", implementation)
        handlers = (
            {n: AttentionHandler() for n in attention_names(model)}
            if implementation == "sdpa"
            else {}
        )
        with intercept(model, handlers):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_names_that_are_no_attention_are_refused() -> None:
    """A missing module, a module that is no attention, and an implementation with other masks are MpqErrors."""
    model = small_model("llama", "sdpa")
    for name, message in (
        ("model.layers.9.self_attn", "no module"),
        ("model.layers.0.mlp.up_proj", "no attention module"),
    ):
        with pytest.raises(MpqError, match=message), intercept(model, {name: AttentionHandler()}):
            pass
    model.config._attn_implementation_internal = "flash_attention_2"
    flash = intercept(model, {"model.layers.0.self_attn": AttentionHandler()})
    with pytest.raises(MpqError, match="attn_implementation='sdpa'"), flash:
        pass
