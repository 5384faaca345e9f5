"""Which models compute alike: a key of what shapes a configuration's computation."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_NAMES = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"}


def architecture_key(config: Any) -> str:
    """SHA-256 over what of a configuration shapes the computation."""
    shaping = {k: v for k, v in config.to_dict().items() if k not in _NAMES}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()
