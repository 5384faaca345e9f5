"""How many tokens a model takes, against what it really does with one more than it has positions for."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import walk
from small import small_model

from mpq.errors import MpqError
from mpq.evaluation.losses import divergences
from mpq.loss.sensitivity import measure_sensitivity
from mpq.models.blocks import Blocks
from mpq.models.positions import check_length
from mpq.timing.measure import measure_ttft


@pytest.mark.parametrize(
    "model_type",
    ["opt", "gpt_neo", "gptj", "codegen", "ctrl", "reformer", "mpt", "xglm", "llama", "jamba"],
)
def test_what_is_refused_could_not_run(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    """Tables of positions, learned or made once, end; positions that are computed, and models without any, go on with a warning."""
    config = walk.tiny(model_type)
    runs, refused = True, ""
    with caplog.at_level(logging.WARNING, "mpq"):
        try:
            check_length(config, 65)
        except MpqError as error:
            refused = str(error)
    try:
        walk.model_of(config)(input_ids=torch.full((1, 65), 5), use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        runs = False
    assert bool(refused) != runs
    said = refused or caplog.text
    assert ("has 64 positions, 65" if refused else "longer than the 64 positions") in said


def test_whatever_runs_a_prompt_asks_first() -> None:
    """Losses, KL, sensitivity and times of more tokens than there are positions are one sentence, not an index out of range."""
    model = small_model("gpt2", n_embd=32, n_layer=1, n_head=4, max_position_embeddings=16)
    blocks = Blocks(np.ones((1, 20), np.int64))
    with pytest.raises(MpqError, match="has 16 positions, 20 tokens"):
        measure_sensitivity(model, [], blocks, formats=["int8"], base="fp32")
    with pytest.raises(MpqError, match="has 16 positions, 20 tokens"):
        divergences(model, {}, blocks, base="fp32")
    for length, output in ((20, 1), (12, 9)):
        with pytest.raises(MpqError, match="has 16 positions, 20 tokens"):
            measure_ttft(model, [{}], base="fp32", batch=1, length=length, output=output)
