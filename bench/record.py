"""Where a bench leaves its result: bench/results/<device>/<bench>.json, with date, device and versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mpq.kernels import device_name

RESULTS = Path(__file__).parent / "results"


def folder_of(device: str = "cpu") -> Path:
    """The device's folder of results, made if need be."""
    kind = re.sub(r", \d+ threads?$", "", device_name(device))
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def recorded(bench: str, result: Any, device: str = "cpu") -> dict[str, Any]:
    """The result with what it was measured with."""
    return {
        "bench": bench,
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "result": result,
    }


def record(bench: str, result: Any, device: str = "cpu") -> None:
    """Write the result, and print it as the last line."""
    text = recorded(bench, result, device)
    (folder_of(device) / f"{bench}.json").write_text(
        json.dumps(text, indent=1) + "\n", encoding="utf-8"
    )
    print(json.dumps(text))
