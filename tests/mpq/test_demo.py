"""The demo checkpoint: trained, of the size promised, and well described by the loss model."""

from __future__ import annotations

import re

import numpy as np
import pytest
from small import DEMO, ROOT

from mpq.evaluation.losses import evaluate_loss, losses
from mpq.loss.sensitivity import measure_sensitivity
from mpq.models.checkpoint import load_config
from mpq.models.graph import trace
from mpq.models.loading import load_model
from mpq.models.partition import partition
from mpq.models.text import read_blocks
from mpq.spec import TextSpec, load_spec


def test_checkpoint_is_what_it_says() -> None:
    """A Llama with grouped-query attention, at most 10 MB, in BF16, with its tokenizer and model card."""
    config = load_config(DEMO)
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.num_hidden_layers >= 4
    checkpoint = [f for f in DEMO.iterdir() if f.suffix != ".txt"]
    assert sum(f.stat().st_size for f in checkpoint) <= 10e6


def test_it_is_trained() -> None:
    """The held-out loss is the one recorded in the card, far below the unigram entropy."""
    card = (DEMO / "README.md").read_text()
    recorded, unigram = (
        float(re.search(rf"\| {name}[^|]*\| ([\d.]+)", card)[1])
        for name in ("held-out loss", "unigram")
    )
    assert recorded < unigram / 2
    text = TextSpec(source=str(DEMO / "heldout.txt"), samples=16, length=256)
    measured = losses(load_model(DEMO, "fp32"), read_blocks(text, DEMO, 2048)).mean()
    assert measured == pytest.approx(recorded, rel=0.15)  # other blocks of the same files


def test_one_op_at_a_time_is_predicted() -> None:
    """Rounding one op at a time to FP8-E4M3 moves the loss as the `ulp` model says, within 25 % on average over every fourth op."""
    model = load_model(DEMO, "fp32")
    blocks = read_blocks(
        TextSpec(source=str(DEMO / "calibration.txt"), samples=16, length=64), DEMO, 2048
    )
    ops = [(op.name, op.kind) for group in partition(trace(model.config)) for op in group.ops]
    table, _ = measure_sensitivity(model, ops, blocks, formats=["fp8_e4m3"], base="fp32", batch=16)
    rows = (
        table.filter(noise_model="ulp", format="fp8_e4m3")
        .select("op", "loss_mse")
        .group_by("op")
        .sum()
    )
    predicted = dict(rows.select("op", "loss_mse").iter_rows())
    base = losses(model, blocks, 16)
    ratios = []
    for op, _ in ops[::4]:
        measured = evaluate_loss(
            model, {op: "fp8_e4m3"}, blocks, base, base="fp32", seeds=range(2), batch=16
        )
        ratios.append(measured.filter(metric="loss_mse")["value"].mean() / predicted[op])
    assert 0.75 <= np.mean(ratios) <= 1.25, ratios


def test_spec_runs_on_the_files_that_are_there() -> None:
    """The demo's spec names files of this repository."""
    spec = load_spec(ROOT / "examples" / "demo.yaml")
    assert all(
        (ROOT / p).exists()
        for p in (spec.model.path, spec.calibration.source, spec.evaluation.source)
    )
