"""What an export is, as export.json beside it says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpq.export.folder import RECORD


@dataclass(frozen=True)
class Exported:
    """What was exported: `formats` counts the lowered linears by format, `check` is what reloading
    it found.

    `key` is what the caller calls its content, "" where it calls it nothing. `caches` says which
    layers, by number, keep keys and values in FP8 and which in base, where any does; `serve` how
    vLLM's server is started, with what no file can say. `weight_bytes` are those of the exported
    tensors, `base_weight_bytes` of the same model all in its base format.
    """

    folder: str
    to: str
    engine: str
    base: str
    formats: Mapping[str, int]
    linears: int
    weight_bytes: int
    base_weight_bytes: int
    plan: str
    fingerprint: str
    check: Mapping[str, Any]
    files: Mapping[str, str]
    notes: tuple[str, ...] = ()
    key: str = ""
    caches: Mapping[str, list[int]] = field(default_factory=dict)
    serve: str = ""


def recorded(folder: Path, out: str) -> Exported:
    """What export.json in `folder` says, of the export at `out`."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    fields = {f.name: record[f.name] for f in dataclasses.fields(Exported) if f.name in record}
    return Exported(**{**fields, "folder": out, "notes": tuple(record["notes"])})


def write_record(made: Exported, folder: Path) -> None:
    """export.json, beside what was exported."""
    from mpq import __version__

    record = {"mpq": __version__, **{k: v for k, v in asdict(made).items() if k != "folder"}}
    (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
