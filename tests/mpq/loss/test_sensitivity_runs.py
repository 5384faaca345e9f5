"""A pass of sensitivity as a whole: shards add up, the model is left as it was, what cannot be measured is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import small_model
from test_sensitivity import FORMAT_NAMES, MODELS, ops_of

from mpq.errors import MpqError
from mpq.evaluation.losses import evaluate_loss, losses
from mpq.loss.sensitivity import measure_sensitivity, merge
from mpq.models.blocks import Blocks


def test_a_model_that_trains_is_left_as_it_was() -> None:
    """Parameters that ask for gradients still do, and have been given none; the table is that of a frozen model."""
    model = small_model("llama", **MODELS["llama"])
    blocks = Blocks(np.random.default_rng(7).integers(0, 97, (2, 12)))
    options = {"formats": ["int8"], "base": "fp32"}
    expected, _ = measure_sensitivity(model, ops_of(model), blocks, **options)
    model.requires_grad_(True)
    model.lm_head.weight.requires_grad_(False)
    got, _ = measure_sensitivity(model, ops_of(model), blocks, **options)
    assert got.equals(expected)
    assert all(p.grad is None for p in model.parameters())
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    assert asking == {n for n, _ in model.named_parameters()} - {"model.embed_tokens.weight"}


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_encoders_are_refused(model_type: str) -> None:
    """The next token's loss means nothing where a token sees the next; as a decoder the same architecture is measured."""
    blocks = Blocks(np.random.default_rng(8).integers(5, 97, (2, 12)))
    options = {"formats": ["int8"], "base": "fp32"}
    encoder = small_model(model_type)
    with pytest.raises(MpqError, match="lets each token see the ones after it"):
        measure_sensitivity(encoder, [("lm_head.dense", "linear")], blocks, **options)
    decoder = small_model(model_type, is_decoder=True)
    linear = next(n for n, m in decoder.named_modules() if isinstance(m, torch.nn.Linear))
    frame, _ = measure_sensitivity(decoder, [(linear, "linear")], blocks, **options)
    assert frame["loss_mse"].max() > 0


def test_blocks_beyond_learned_positions_are_told() -> None:
    """More tokens than the model has positions is a sentence, not an index that is out of range."""
    model = small_model("gpt2", n_embd=32, n_layer=1, n_head=4, max_position_embeddings=16)
    blocks = Blocks(np.ones((1, 20), np.int64))
    with pytest.raises(MpqError, match="has 16 positions, 20 tokens"):
        measure_sensitivity(model, ops_of(model), blocks, formats=["int8"], base="fp32")
    with pytest.raises(MpqError, match="has 16 positions, 20 tokens"):
        losses(model, blocks)


def test_a_perplexity_beyond_floats_is_infinite(caplog: pytest.LogCaptureFixture) -> None:
    """A loss above 709 nats has an infinite perplexity, which is told; its other metrics are numbers."""
    model = small_model("llama", **MODELS["llama"])
    model.model.embed_tokens.weight.mul_(3e4)
    model.model.norm.weight.mul_(1e3)
    model.lm_head.weight.mul_(1e3)
    blocks = Blocks(np.random.default_rng(9).integers(0, 97, (2, 12)))
    base = losses(model, blocks)
    assert base.mean() > 710
    frame = evaluate_loss(model, {}, blocks, base, base="fp32", seeds=[0])
    values = dict(frame.select("metric", "value").iter_rows())
    assert values["perplexity"] == float("inf")
    assert values["loss_mse"] == 0
    assert "no finite perplexity" in caplog.text


def test_shards_add_up() -> None:
    """Shards merged equal the whole set in one go, whatever their sizes."""
    model = small_model("llama", **MODELS["llama"])
    blocks = Blocks(np.random.default_rng(2).integers(0, 97, (7, 12)))
    options = {"formats": FORMAT_NAMES, "base": "fp32", "batch": 7, "first_layer": False}
    whole, loss = measure_sensitivity(model, ops_of(model), blocks, **options)
    parts = [
        measure_sensitivity(model, ops_of(model), shard, **options) for shard in blocks.shards(3)
    ]
    merged, merged_loss = merge([p[0] for p in parts], [p[1] for p in parts])
    both = whole.join(merged, on=["op", "operand", "format", "noise_model"], suffix="_merged")
    assert both.height == whole.height
    np.testing.assert_allclose(both["loss_mse_merged"], both["loss_mse"], rtol=1e-5, atol=1e-20)
    for column in ("kl", "kl_shared", "kl_shared_stderr", "loss_mse_shared"):
        ours, theirs = both[column].drop_nulls(), both[f"{column}_merged"].drop_nulls()
        assert len(ours) == len(theirs) > 0
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-20)
    assert merged["n_samples"].unique().to_list() == [7]
    assert merged_loss["mean_square_loss"][0] == pytest.approx(
        loss["mean_square_loss"][0], rel=1e-6
    )


def test_checkpointing_changes_nothing() -> None:
    """Recomputed activations give the same table."""
    model = small_model("llama", **MODELS["llama"])
    blocks = Blocks(np.random.default_rng(3).integers(0, 97, (2, 12)))
    options = {"formats": ["bf16"], "base": "fp32"}
    plain, _ = measure_sensitivity(model, ops_of(model), blocks, **options)
    saved, _ = measure_sensitivity(
        model, ops_of(model), blocks, checkpoint_activations=True, **options
    )
    keys = ["op", "operand", "format", "noise_model"]
    np.testing.assert_allclose(
        plain.sort(keys)["loss_mse"], saved.sort(keys)["loss_mse"], rtol=1e-5
    )


def test_leaves_the_model_as_it_was() -> None:
    """After a measurement the logits are bit-identical and nothing is left on the modules."""
    model = small_model("gpt2", n_embd=32, n_layer=2, n_head=4)
    ids = torch.arange(10)[None]
    before = model(ids).logits
    measure_sensitivity(
        model, ops_of(model), Blocks(np.ones((1, 8), np.int64)), formats=["int8"], base="fp32"
    )
    assert torch.equal(model(ids).logits, before)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_nan_loss_is_told() -> None:
    """A model with a NaN weight is refused with the sample that showed it."""
    model = small_model("llama", **MODELS["llama"])
    model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(MpqError, match="loss of calibration sample 0 is nan"):
        measure_sensitivity(
            model, ops_of(model), Blocks(np.ones((1, 8), np.int64)), formats=["bf16"], base="fp32"
        )


def test_unknown_op_is_told() -> None:
    """An op that the model lacks is named."""
    model = small_model("llama", **MODELS["llama"])
    with pytest.raises(MpqError, match=r"no op 'model\.layers\.9"):
        measure_sensitivity(
            model,
            [("model.layers.9.mlp.up_proj", "linear")],
            Blocks(np.ones((1, 8), np.int64)),
            formats=["bf16"],
            base="fp32",
        )
