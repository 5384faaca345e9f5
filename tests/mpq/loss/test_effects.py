"""Signed effects of weights' rounding against autograd of the parameters themselves, one sample
at a time."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from small import small_model
from torch import Tensor, nn

from mpq.formats.quantize import fake_quantize
from mpq.formats.scheme import get_scheme
from mpq.kernels import errors
from mpq.loss import joined, measure
from mpq.loss.effects import effects_table
from mpq.models.blocks import Blocks

FORMATS = ["bf16", "int8", "nvfp4", "fp8_block"]
DENSE = {"num_key_value_heads": 2, "head_dim": 8}
MIXTURE = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def weights_of(model: nn.Module) -> dict[tuple[str, str], nn.Parameter]:
    """(op, kind) → its parameter: linears, and the experts' products, routers left out."""
    found = {
        (name, "linear"): m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    for name, module in model.named_modules():
        if name.endswith("experts"):
            found |= {(f"{name}.{n}", "experts"): p for n, p in module.named_parameters()}
    return found


def rounded(weight: Tensor, name: str) -> Tensor:
    """A weight (or those of experts, one after the other) as the scheme stores it."""
    each = weight if weight.dim() == 3 else weight[None]
    whole = [fake_quantize(w.detach().float(), get_scheme(name).weights, "row") for w in each]
    return torch.stack(whole).view_as(weight)


def gradients(
    model: nn.Module, tokens: np.ndarray, weights: dict[tuple[str, str], nn.Parameter]
) -> list[tuple[Tensor, ...]]:
    """∂g_i/∂W of every weight, for one sample after the other."""
    model.requires_grad_(True)
    found = []
    for row in tokens:
        ids = torch.from_numpy(row)[None]
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[0, :-1], ids[0, 1:])
        found.append(torch.autograd.grad(loss, list(weights.values()), materialize_grads=True))
    model.requires_grad_(False)
    return found


@pytest.mark.parametrize("swept", [True, False], ids=["cpp", "torch"])
@pytest.mark.parametrize(("model_type", "sizes"), [("llama", DENSE), ("mixtral", MIXTURE)])
def test_equals_the_parameters_gradients(
    model_type: str, sizes: dict, swept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sample's effect of every op and format is the product of the parameter's own
    gradient and rounding error, with its sign, in C++ and in torch; shards joined are the whole."""
    if not swept:
        monkeypatch.setattr(errors, "_library", lambda: None)
    model = small_model(model_type, **sizes)
    weights = weights_of(model)
    blocks = Blocks(np.random.default_rng(1).integers(0, 97, (5, 12)))
    of_each = gradients(model, blocks.tokens, weights)
    how = {"formats": FORMATS, "base": "fp32", "batch": 3, "measures": ["loss"]}
    shards = [measure(model, list(weights), shard, **how) for shard in blocks.shards(2)]
    got = joined([s.effects for s in shards], [s.loss for s in shards])
    assert got.height == 5 * len(weights) * len(FORMATS)
    for (op, _), of_op in got.group_by("op", "format"):
        assert sorted(of_op["sample"]) == list(range(5)), op
    found = {(s, op, f): e for s, op, f, e in got.iter_rows()}
    for f in FORMATS:
        for place, ((op, _), weight) in enumerate(weights.items()):
            error = (rounded(weight, f) - weight).double()
            for sample, of_sample in enumerate(of_each):
                terms = of_sample[place].double() * error
                near = pytest.approx(float(terms.sum()), abs=2e-5 * float(terms.norm()) + 1e-15)
                assert found[sample, op, f] == near, (sample, op, f)


def test_sum_over_ops_is_how_the_loss_moves() -> None:
    """All weights rounded to BF16, activations left alone: each sample's loss moves by the sum
    of its effects, up or down."""
    model = small_model("llama", **DENSE)
    weights = weights_of(model)
    blocks = Blocks(np.random.default_rng(2).integers(0, 97, (6, 16)))
    effects = measure(model, list(weights), blocks, formats=["bf16"], base="fp32").effects
    predicted = effects.group_by("sample").agg(pl.col("effect").sum()).sort("sample")["effect"]

    def losses() -> np.ndarray:
        ids = torch.from_numpy(blocks.tokens)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return each.mean(1).numpy()

    model.double()  # the change is a millionth of the loss
    before = losses()
    for weight in weights.values():
        weight.copy_(rounded(weight, "bf16"))
    moved = losses() - before
    assert np.abs(moved).max() > 0
    np.testing.assert_allclose(predicted, moved, atol=0.05 * np.abs(moved).max())
    assert predicted.mean() == pytest.approx(moved.mean(), abs=0.05 * np.abs(moved).max())


def test_without_the_loss_there_are_none() -> None:
    """Where KL alone is measured the table is empty, and has its columns."""
    model = small_model("llama", **DENSE)
    blocks = Blocks(np.ones((1, 8), np.int64))
    found = measure(
        model, [("lm_head", "linear")], blocks, formats=["int8"], base="fp32", measures=["kl"]
    )
    assert found.effects.columns == ["sample", "op", "format", "effect"]
    assert found.effects.is_empty()


def test_samples_keep_their_numbers() -> None:
    """An op that the first batch did not run through has no effect on that batch's samples; the later ones' are theirs."""
    batch = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    table = effects_table({"op": [(3, batch)]}, 6, [get_scheme("int8")])
    assert table.sort("sample")["effect"].to_list() == [0, 0, 0, 1, 2, 0]
