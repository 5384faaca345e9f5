"""A run's record: which tables it made, so that its report can be written again anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from mpq.errors import MpqError
from mpq.store.entries import Damaged, Store, TableRef


def write_run(
    folder: Path, name: str, facts: Mapping[str, str], tables: Mapping[str, Sequence[TableRef]]
) -> None:
    """Write `run.json`: the references of the run's tables and what the report says of the run."""
    record = {
        "name": name,
        "facts": dict(facts),
        "tables": {k: [asdict(r) for r in refs] for k, refs in tables.items()},
    }
    (folder / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, pl.DataFrame]]:
    """The record of a run and its tables.

    Raises MpqError where the folder is no run's or a table is gone.
    """
    path = folder / "run.json" if folder.is_dir() else folder
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        references = {
            k: [TableRef(**{**r, "upstream": tuple(r["upstream"])}) for r in refs]
            for k, refs in record["tables"].items()
        }
    except FileNotFoundError:
        raise MpqError(
            f"No run at {folder}: expected a folder with run.json, as `mpq run` writes under its "
            "spec's `out`."
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise MpqError(f"{path} is not the record of a run ({error}).") from None
    try:
        return record, join_tables(references)
    except Damaged as damage:
        raise MpqError(
            f"A table of the run is missing or damaged ({damage}): run the spec again, what is "
            "whole is re-used."
        ) from None


def join_tables(references: Mapping[str, Sequence[TableRef]]) -> dict[str, pl.DataFrame]:
    """Each kind's parts as one table. Raises Damaged."""
    return {
        kind: pl.concat([Store(ref.store).read_table(ref) for ref in refs], how="diagonal_relaxed")
        for kind, refs in references.items()
        if refs
    }
