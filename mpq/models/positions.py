"""How many positions a model knows, against how many a text or a prefill asks of it."""

from __future__ import annotations

import logging
from typing import Any

from mpq.errors import MpqError

log = logging.getLogger("mpq")

_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions")
# signs of positions that are computed (rotary, sinusoidal, ALiBi), not looked up in a table of learned ones
_COMPUTED = (
    "rope_parameters",
    "rope_theta",
    "rotary_dim",
    "rotary_pct",
    "rotary_emb_base",
    "alibi",
)
_SINUSOIDAL = ("xglm", "ctrl", "musicgen_decoder")


def check_length(config: Any, length: int) -> None:
    """Raise MpqError where `length` tokens are more than the model has learned positions; warn where it computes them.

    Rotary models run beyond the length that they were trained on, and are worse there than any format makes them.
    """
    text = config.get_text_config()
    known = next((n for a in _LIMITS if isinstance(n := getattr(text, a, None), int)), None)
    if known is None or length <= known:
        return
    computed = any(getattr(text, sign, None) for sign in _COMPUTED)
    if computed or text.model_type in _SINUSOIDAL:
        log.warning(
            "Blocks of %d tokens are longer than the %d positions that the model was made for: its loss may be far off.",
            length,
            known,
        )
        return
    raise MpqError(
        f"The model has {known} positions, {length} tokens were asked for: lower the length to {known} or less."
    )
