"""JSON that people or other machines hand in: parsed, or a ValueError, whatever it is."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """What the JSON says. Raises ValueError, in one short line, where it is none or is nested too deep to be read."""
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
