"""Every causal language model of the installed transformers, tiny: named, measured, lowered and restored, or listed with why not.

The walk over all of them takes ten minutes of one core: `pytest -m walk`; a few run always.
"""

from __future__ import annotations

import re

import pytest
import walk
from small import ROOT

ALWAYS = (
    "bloom",  # attention not dispatched by name
    "dbrx",  # experts whose loop no trace can follow
    "falcon",  # linears of a class of its own
    "gptj",
    "inkling_text",  # attention with a bias for each sample
    "llama",
    "llama4_text",  # experts that are not dispatched
    "mamba",  # a scan
    "nemotron_h",  # experts without a gate
    "phi3",
    "qwen2_moe",  # a shared expert
    "roc_bert",  # writes into what a linear returns
)
LISTED = dict(
    re.findall(
        r"^\| `([\w.-]+)` \| (.+) \|$",
        (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
)


@pytest.mark.parametrize("model_type", ALWAYS)
def test_an_architecture(model_type: str) -> None:
    """Every linear that runs is named, taps change no logits, each op has a sensitivity, and lowered ops are restored."""
    found = walk.walk(model_type)
    assert not found["fails"], found


def test_what_is_listed_exists() -> None:
    """The list in docs names architectures of transformers' and gives each a reason."""
    known = walk.all_types()
    assert LISTED
    assert {name for name in LISTED if name not in known} == set()


@pytest.mark.walk
@pytest.mark.parametrize("model_type", walk.all_types())
def test_every_architecture(model_type: str) -> None:
    """What fails is in the list, and what is in the list fails: it neither grows nor goes stale unseen."""
    found = walk.walk(model_type)
    assert bool(found["fails"]) == (model_type in LISTED), found
