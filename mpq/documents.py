"""JSON that people or other machines hand in: parsed, or a ValueError, whatever it is."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """What the JSON says. Raises ValueError, in one short line, where it is none, is nested too deep to be read, or says
    something twice: JSON's readers take the last, whatever was meant."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found
