"""Which ops of a checkpoint are stored quantized: base is no better than that for them, and has no less noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpq.models.dense import Dense, dense_tensors
from mpq.models.graph import build_on_meta
from mpq.models.layout import read_config
from mpq.models.quantized import method_of


def stored_formats(folder: Path, config: Any) -> dict[str, str]:
    """Op → how the checkpoint in `folder` stores its weight (`fp8_e4m3`, `int4`, ...), of those that it stores quantized; only
    headers are read. `config` is its configuration (load_config). Raises MpqError for a layout that cannot be read."""
    if not method_of(read_config(folder), folder):
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    model: Any = build_on_meta(config)
    known, prefix = model.state_dict(), model.base_model_prefix
    ways = get_model_conversion_mapping(model)
    renamings = [way for way in ways if isinstance(way, WeightRenaming)]
    converters = [way for way in ways if isinstance(way, WeightConverter)]
    found = {}
    for tensor, part in dense_tensors(folder).items():
        if isinstance(part, Dense):
            name, _ = rename_source_key(tensor, renamings, converters, prefix, known)
            found[name.removesuffix(".weight")] = part.stored
    return found
