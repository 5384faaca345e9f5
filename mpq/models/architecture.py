"""Which class of transformers a configuration is built as, and which models compute alike."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_NAMES = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}


def architecture_key(config: Any) -> str:
    """SHA-256 over what of a configuration shapes the computation; `architectures` too, which says whether tokens see later ones
    and whether there is more than a language model."""
    shaping = {k: v for k, v in config.to_dict().items() if k not in _NAMES}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()


def auto_class(config: Any) -> Any:
    """The automatic class of transformers that makes the whole model of this configuration, with a head for the next token.

    Checkpoints that say they are a multimodal model (Qwen-VL, Mistral 3, Llama 4) are built as such, so that nothing of them is
    left out; text alone runs through their language model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    known: Any = AutoModelForMultimodalLM._model_mapping
    named = known[type(config)].__name__ if type(config) in known else ""
    return (
        AutoModelForMultimodalLM if named in (config.architectures or ()) else AutoModelForCausalLM
    )
