"""Where text comes from: files, URLs and datasets as a list of documents, and the key of a source's content.

A document is a text, a chat (a list of messages with role and content) or the ids of tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
import polars as pl

from mpq.documents import parse_json
from mpq.errors import MpqError, first_line, is_out_of_memory
from mpq.spec import TextSpec
from mpq.spec.early import OF_FILES

Document: TypeAlias = str | list[dict[str, Any]] | list[int]


@dataclass(frozen=True)
class Documents:
    """What a source holds, in order, and how many of its rows were null or empty and so left out."""

    documents: tuple[Document, ...]
    skipped: int = 0


def read_documents(spec: TextSpec) -> Documents:
    """The documents of a text file, JSONL, Parquet or a dataset; compressed files are opened by their ending.

    Raises MpqError where there is no such source, it cannot be read, or its field holds something else than documents.
    """
    source = local(spec.source)
    if is_dataset(source):
        return _documents(_dataset(spec)[spec.field], spec)
    name = _plain_name(source)
    if name.endswith(".parquet"):
        return _documents(_parquet(source, spec.field), spec)
    if name.endswith(_OTHERS):
        raise MpqError(
            f"{source} is a table or an archive, whose commas or headers would be read as text: save it as .parquet or .jsonl."
        )
    text = _read_text(source)
    if not name.endswith(_LINES):
        if spec.field != TextSpec.model_fields["field"].default:
            raise MpqError(
                f"{source} is read as plain text, which has no {spec.field!r}: expected a name that ends in {', '.join(_LINES)} or .parquet, or no field."
            )
        _refuse_other(text, source)
        return Documents((text,))
    # at \n alone: JSON strings may hold other line separators as they are
    lines = (line for line in text.split("\n") if line.strip())
    return _documents((_value(line, n, spec) for n, line in enumerate(lines, 1)), spec)


def local(source: str) -> str:
    """A source with the home folder written out; URLs as they are."""
    return source if "://" in source else os.path.expanduser(source)


def is_dataset(source: str) -> bool:
    """Whether a source is a dataset's folder or hub id. Raises MpqError where it is nothing at all."""
    if "://" in source or Path(source).is_file():
        return False
    name, _ = _named(source)
    if Path(name).is_dir():
        return True
    if name.count("/") <= 1 and not name.startswith((".", "/", "~")) and _may_be_id(name):
        return True
    raise MpqError(
        f"No text at {source}: expected a text file, .jsonl, .parquet, .npy, an fsspec URL, a dataset's folder or its Hugging Face id."
    )


def _named(source: str) -> tuple[str, str]:
    """A dataset's folder or id, and which of its configurations is meant, "" where none is named."""
    if Path(source).is_dir():
        return source, ""
    name, _, configuration = source.partition(":")
    return name, configuration


def _may_be_id(name: str) -> bool:
    return bool(name.strip()) and Path(name).suffix not in OF_FILES and "\0" not in name


_LINES = (".jsonl", ".ndjson", ".json")  # a JSON object a line
_OTHERS = (".csv", ".tsv", ".zip", ".tar", ".tgz")
_COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4")  # as fsspec tells them


def source_key(spec: TextSpec) -> str:
    """Hash of a text source's content, without making it into tokens: of a file's or a folder's bytes, and what they are read as.

    A hub id counts by id, configuration, split, revision and datasets' own fingerprint of what they name now, which
    fetches it where it is not at hand. Raises MpqError where it cannot be read.
    """
    source = local(spec.source)
    if not is_dataset(source):
        return _digest(["file", _kind(source), _of_file(source)])
    name, configuration = _named(source)
    if Path(name).is_dir():
        files = sorted(f for f in Path(name).rglob("*") if f.is_file())
        content = [[str(f.relative_to(name)), _of_file(str(f))] for f in files]
        return _digest(["folder", content, configuration, spec.split])
    return _digest(["id", source, spec.split, spec.revision, _dataset(spec)._fingerprint])


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _of_file(source: str) -> str:
    try:
        with fsspec.open(source, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ImportError, ValueError) as error:
        raise MpqError(f"{source} cannot be read ({first_line(error)}).") from None


def _kind(source: str) -> str:
    """What a file is read as, by its ending: the same bytes are another text in another kind of file."""
    name = _plain_name(source)
    kind = next((end for end in (*_LINES, ".npy", ".parquet") if name.endswith(end)), "")
    return ("lines" if kind in _LINES else kind) + source.lower()[len(name) :]


def _plain_name(source: str) -> str:
    """The name in small letters, without the ending of a compression."""
    name = source.lower()
    return name[: -len(end)] if (end := next(filter(name.endswith, _COMPRESSED), "")) else name


def _read_text(source: str) -> str:
    try:
        with fsspec.open(source, "rb", compression="infer") as stream:
            return stream.read().decode("utf-8-sig")  # type: ignore[no-any-return]
    except Exception as error:  # what the system, the storage or the compression's reader raise
        raise _unreadable(source, "UTF-8 text", error) from None


def _refuse_other(text: str, source: str) -> None:
    """Raise MpqError where a file of another name holds JSON, line by line, or bytes that are no text."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    if first.lstrip().startswith(("{", "[")):
        try:
            parsed = parse_json(first)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict | list):
            raise MpqError(
                f"{source} holds JSON, which would be calibrated on as it stands: call it .jsonl, or give its text alone."
            )
    if "\0" in text:
        raise MpqError(
            f"{source} holds NUL characters, as text in UTF-16 does: expected text in UTF-8."
        )


def _parquet(source: str, field: str) -> Iterable[Any]:
    try:
        with fsspec.open(source, "rb", compression="infer") as stream:
            frame = pl.read_parquet(stream)
    except Exception as error:
        raise _unreadable(source, "Parquet", error) from None
    if field not in frame.columns:
        raise MpqError(
            f"{source} has no column {field!r}: set field to one of {', '.join(frame.columns[:8])}."
        )
    return frame[field].to_list()


def _unreadable(source: str, kind: str, error: Exception) -> MpqError:
    if is_out_of_memory(error):
        return MpqError(f"There is not enough memory to read {source}: give a smaller file.")
    return MpqError(f"{source} cannot be read as {kind} ({first_line(error)}).")


def _value(line: str, number: int, spec: TextSpec) -> Any:
    try:
        return json.loads(line)[spec.field]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MpqError(
            f"{spec.source} is not JSONL with the key {spec.field!r} on each line (line {number}: {first_line(error)})."
        ) from None


def _documents(values: Iterable[Any], spec: TextSpec) -> Documents:
    found: list[Document] = []
    skipped = 0
    for number, value in enumerate(values, 1):
        if value is None or (isinstance(value, (str, list)) and not value):
            skipped += 1
        elif isinstance(value, str) or _is_ids(value):
            found.append(value)
        elif _is_chat(value) and (chat := _chat(value)):
            found.append(chat)
        else:
            raise MpqError(
                f"Row {number} of {spec.source} holds a {type(value).__name__} in {spec.field!r}: expected text, chat messages (role, content: texts) or token ids."
            )
    return Documents(tuple(found), skipped)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)


def _chat(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with texts for contents, or None where a content is none: templates print whatever they are given.

    Parts of a text are joined, as a template for parts would; a message without content, as a call of a tool is, has an empty one.
    """
    found = []
    for message in messages:
        content = message.get("content")
        parts = (
            content if isinstance(content, list) else [{"text": "" if content is None else content}]
        )
        texts: list[Any] = [p.get("text") if isinstance(p, dict) else p for p in parts]
        if not all(isinstance(t, str) for t in texts) or not isinstance(message["role"], str):
            return None
        found.append({**message, "content": "".join(texts)})
    return found


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and abs(i) < 2**63 for i in value
    )


def _dataset(spec: TextSpec) -> Any:
    from datasets import load_dataset

    name, configuration = _named(local(spec.source))
    try:
        rows = load_dataset(
            name,
            configuration or None,
            split=spec.split,
            revision=None if Path(name).is_dir() else spec.revision,
        )
    except Exception as error:  # datasets and the hub's client raise many kinds
        raise MpqError(
            f"{spec.source} is no local file and could not be loaded as a dataset ({first_line(error)})."
        ) from None
    if spec.field not in (rows.column_names or ()):
        raise MpqError(
            f"{spec.source} has no column {spec.field!r}: set field to one of {', '.join((rows.column_names or ())[:8])}."
        )
    return rows
