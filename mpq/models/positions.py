"""How many positions a model knows, against how many a text or a prefill asks of it."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from mpq.errors import MpqError

log = logging.getLogger("mpq")

_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_seq_len")


def check_length(config: Any, length: int) -> None:
    """Raise MpqError where `length` tokens are more than the model has a table of positions for; warn where it computes them.

    Rotary models run beyond the length that they were trained on, and are worse there than any format makes them.
    """
    text = config.get_text_config()
    known = next((n for a in _LIMITS if isinstance(n := getattr(text, a, None), int)), None)
    if known is None or length <= known:
        return
    if not _has_table(config, known):
        log.warning(
            "Blocks of %d tokens are longer than the %d positions that the model was made for: its loss may be far off.",
            length,
            known,
        )
        return
    raise MpqError(
        f"The model has {known} positions, {length} tokens were asked for: lower the length to {known} or less."
    )


def _has_table(config: Any, known: int) -> bool:
    """Whether the model looks positions up in a table of as many, learned or made once; else it computes them, or has none.

    Tables may hold a few rows more, such as OPT's two for padding. Those that transformers makes longer when asked to do not count.
    """
    from mpq.models.graph import build_on_meta

    # a table in two factors; ALiBi of max_seq_len tokens, which MPT makes in each forward
    if getattr(config, "axial_pos_embds", False) or config.model_type == "mpt":
        return True
    model = build_on_meta(config)
    of_tokens = model.get_input_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is of_tokens or hasattr(module, "make_weights"):
            continue
        held = {**vars(module), **module._parameters, **module._buffers}
        for key, value in held.items():
            named = isinstance(module, nn.Embedding) or "pos" in f"{name}.{key}"
            sizes = value.shape[:2] if isinstance(value, Tensor) and value.ndim < 4 else ()
            if named and any(known <= size <= known + 2 for size in sizes):
                return True
    return False
