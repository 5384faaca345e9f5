"""A run's record: which tables it made, so that its report can be written again anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from mpq.documents import parse_json
from mpq.errors import MpqError, first_line
from mpq.report.results import OBJECTIVES
from mpq.spec import BoundsSpec
from mpq.store.entries import Damaged, Store, TableRef
from mpq.store.handed_in import complete
from mpq.store.tables import SCHEMAS


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


def read_record(path: Path) -> tuple[dict[str, Any], dict[str, list[TableRef]]]:
    """The record in a `run.json`, and the references of its tables.

    Raises MpqError where it is none.
    """
    try:
        record = parse_json(path.read_bytes())
        if not isinstance(record, dict) or not isinstance(record.get("tables"), dict):
            raise ValueError("expected a mapping with name, facts and tables")
        for name, kind in (("name", str), ("facts", dict)):
            if not isinstance(record.get(name), kind):
                raise ValueError(f"{name} is missing or of another kind")
        if not all(isinstance(fact, str) for fact in record["facts"].values()):
            raise ValueError("facts are no texts")
        references = {}
        for kind_, refs in record["tables"].items():
            if not isinstance(refs, list):
                raise ValueError(f"{kind_} is no list of tables")
            references[kind_] = [TableRef.of(ref) for ref in refs]
    except FileNotFoundError:
        raise _no_run(path) from None
    except (ValueError, OSError) as error:
        raise MpqError(
            f"{path} is not the record of a run ({error}): mend it or take the folder away."
        ) from None
    return record, references


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, pl.DataFrame]]:
    """The record of a run and its tables, with the columns that earlier versions did not have.

    Raises MpqError where the folder is no run's, a table is gone, or is none of its kind.
    """
    if not folder.exists():
        raise _no_run(folder)
    record, references = read_record(folder / "run.json" if folder.is_dir() else folder)
    try:
        joined = join_tables(references)
    except Damaged as damage:
        raise MpqError(
            f"A table of the run is missing or damaged ({damage}): run the spec again, what is "
            "whole is re-used."
        ) from None
    return record, {kind: _checked(kind, frame) for kind, frame in joined.items()}


def bounds_of(facts: Mapping[str, str]) -> BoundsSpec | None:
    """The bounds on whole plans under which a run was made, None where there were none.

    Raises MpqError where its record has something else in their place.
    """
    if "bounds" not in facts:
        return None
    try:
        return BoundsSpec.model_validate_json(facts["bounds"])
    except ValueError:
        raise MpqError(
            f"The run's record has bounds = {facts['bounds']!r}, expected those of a spec in JSON: mend run.json, or run the spec again."
        ) from None


def _checked(kind: str, frame: pl.DataFrame) -> pl.DataFrame:
    """A run's table as this version writes it. Raises MpqError for one that no version wrote."""
    if kind not in SCHEMAS:
        return frame
    try:
        frame = complete(kind, frame)
        if "objective" in SCHEMAS[kind] and (of := set(frame["objective"]) - set(OBJECTIVES)):
            raise MpqError(
                f"The {kind} table has the objective {min(of)}: expected {', '.join(OBJECTIVES)}."
            )
    except MpqError as error:
        raise MpqError(
            f"{error} No stage of mpq wrote this table of the run: run the spec again with another `store`."
        ) from None
    return frame


def _no_run(path: Path) -> MpqError:
    return MpqError(
        f"No run at {path}: expected a folder with run.json, as `mpq run` writes under its spec's "
        "`out`."
    )


def join_tables(references: Mapping[str, Sequence[TableRef]]) -> dict[str, pl.DataFrame]:
    """Each kind's parts as one table. Raises Damaged."""
    joined = {}
    for kind, refs in references.items():
        parts = [Store(ref.store).read_table(ref) for ref in refs]
        try:
            if parts:
                joined[kind] = pl.concat(parts, how="diagonal_relaxed")
        except pl.exceptions.PolarsError as error:
            raise Damaged(f"the parts of {kind} do not fit ({first_line(error)})") from None
    return joined
