"""A layer's keys and values in an FP8 cache, against transformers' own cache with values rounded by ml_dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import polars as pl
import pytest
import torch
from small import small_model
from torch import Tensor
from transformers import DynamicCache

from mpq.errors import MpqError
from mpq.loss import measure_sensitivity
from mpq.models.blocks import Blocks
from mpq.running.apply import apply_plan

MODEL = small_model("llama", num_key_value_heads=2, tie_word_embeddings=False)
TOKENS = np.random.default_rng(3).integers(0, 97, (2, 24))
PRODUCTS = [f"model.layers.{layer}.self_attn.{x}_matmul" for layer in (0, 1) for x in ("qk", "av")]


def rounded(x: Tensor) -> Tensor:
    """`x` in E4M3 with one scale, the power of two that puts its largest magnitude between 28 and 56."""
    scale = 2.0 ** math.floor(math.log2(float(x.abs().max()) / 28))
    codes = (x / scale).numpy().astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(codes.astype(np.float32)) * scale


class Kept(DynamicCache):
    """A cache that keeps what `store` makes of each layer's keys and values."""

    def __init__(self, store: Callable[[int, str, Tensor], Tensor]) -> None:
        super().__init__()
        self.store = store

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        return self.store(layer, "qk", key), self.store(layer, "av", value)


def logits(cache: DynamicCache | None = None) -> Tensor:
    """The model's, with that cache."""
    how: dict[str, Any] = {"use_cache": False} if cache is None else {"past_key_values": cache}
    with torch.inference_mode():
        found: Tensor = MODEL(input_ids=torch.from_numpy(TOKENS), **how).logits
    return found


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_a_plan_runs_as_with_a_cache_in_fp8(layers: tuple[int, ...]) -> None:
    """K after its rotation and V, heads not yet repeated, are rounded with a scale a tensor; Q, P and other layers are not."""
    want = logits(Kept(lambda layer, _, x: rounded(x) if layer in layers else x))
    formats = {op: "fp8_kv" for op in PRODUCTS if int(op.split(".")[2]) in layers}
    with apply_plan(MODEL, formats, base="fp32"):
        found = logits()
    moved = (want - logits()).abs().max()
    assert moved > 1e-3
    assert (found - want).abs().max() < 1e-3 * moved


def test_its_predicted_kl_is_of_keys_and_values_alone() -> None:
    """½ T Σ g² e² over K and over V, by autograd through transformers' own cache; Q and P have none, and linears no row."""
    ops = [(op, "bgemm") for op in PRODUCTS] + [("model.layers.0.mlp.up_proj", "linear")]
    blocks = Blocks(TOKENS)
    how: dict[str, Any] = {"formats": ["fp8_kv", "fp8_e4m3"], "base": "fp32", "batch": 2}
    frame, _ = measure_sensitivity(MODEL, ops, blocks, measures=["loss"], **how)
    frame = frame.filter(pl.col("format") == "fp8_kv")
    assert set(frame["noise_model"]) == {"actual"}
    assert set(frame["op"]) == set(PRODUCTS)
    want = dict.fromkeys(PRODUCTS, 0.0)
    for tokens in blocks.batches(1):
        seen: dict[str, Tensor] = {}

        def leaf(layer: int, product: str, x: Tensor, seen: dict[str, Tensor] = seen) -> Tensor:
            kept = x if x.requires_grad else x.detach().requires_grad_()
            seen[f"model.layers.{layer}.self_attn.{product}_matmul"] = kept
            return kept

        with torch.enable_grad():
            predicted = MODEL(input_ids=tokens, past_key_values=Kept(leaf)).logits.log_softmax(-1)
            loss = -predicted[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
            gradients = torch.autograd.grad(loss, list(seen.values()))
        for (op, u), g in zip(seen.items(), gradients, strict=True):
            error = rounded(u.detach()) - u.detach()
            want[op] += float((g.double() * error).square().sum()) / len(TOKENS)
    for op, operand, loss_mse in frame.select("op", "operand", "loss_mse").iter_rows():
        expected = want[op] if operand == "rhs" else 0.0
        assert loss_mse == pytest.approx(expected, rel=1e-3), (op, operand)


def test_what_it_is_not_for_is_refused() -> None:
    """A linear has no cache; and no scheme of weights is one of attention's products."""
    with (
        pytest.raises(
            MpqError, match="k_proj cannot run in fp8_kv, which is a scheme of the cache"
        ),
        apply_plan(MODEL, {"model.layers.0.self_attn.k_proj": "fp8_kv"}, base="fp32"),
    ):
        pass
    with (
        pytest.raises(
            MpqError, match="qk_matmul cannot run in w4a16, which is a scheme of weights"
        ),
        apply_plan(MODEL, {PRODUCTS[0]: "w4a16"}, base="fp32"),
    ):
        pass
