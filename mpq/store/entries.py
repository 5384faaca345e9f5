"""Content-addressed tables and files on any fsspec URL.

Layout, under one URL (`file:///…`, `memory://…`, `s3://…`, …):

    <kind>/<key>/<sha256 of the data>.<suffix>     the data
    <kind>/<key>/meta.json                         provenance, and which data file is the one

The data goes first and `meta.json` last, each in one atomic step, so a reader sees a whole entry or none. Data files are
named by their own hash: two writers of one key cannot mix, and the last `meta.json` wins. A reader checks the hash, so
damage is noticed when it is read, never served.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import platform
import posixpath
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import fsspec
import polars as pl

from mpq import __version__
from mpq.errors import MpqError
from mpq.store.transport import OBJECT_STORES, carry, open_filesystem, refuse_credentials, why

log = logging.getLogger("mpq")


class Damaged(Exception):
    """An entry is missing, cut short or altered. Stages answer it by computing again, with a warning."""


@dataclass(frozen=True)
class TableRef:
    """A pointer to one entry: small enough for Prefect's database, enough to read the entry and to check it."""

    kind: str
    key: str
    sha256: str
    bytes: int
    rows: int
    suffix: str = "parquet"
    upstream: tuple[str, ...] = ()
    store: str = ""

    @property
    def uri(self) -> str:
        """Where the data lies."""
        return posixpath.join(self.store, self.kind, self.key, f"{self.sha256}.{self.suffix}")


def content_key(*parts: Any) -> str:
    """A SHA-256 over the canonical JSON of `parts`: equal content, equal key, whatever the order of mappings."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no canonical form, so it cannot be part of a key")


@dataclass(frozen=True)
class StoredFile:
    """A file as a listing shows it: bytes, and when it was written (Unix seconds; now, where the storage does not say)."""

    bytes: int
    modified_unix_s: float


def _modified(info: Mapping[str, Any]) -> float:
    for name in ("LastModified", "last_modified", "mtime", "updated", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return time.time()


def _protocols(fs: fsspec.AbstractFileSystem) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Store:
    """Entries under `url`. Raises MpqError where the store cannot be reached, Damaged where an entry is not whole.

    A URL that carries credentials is refused: it would be kept in references, records and logs.
    """

    url: str
    _options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_credentials(self.url)

    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return open_filesystem(self.url, self._options)

    def _write(self, path: str, data: bytes) -> None:
        fs, root = self._open()
        target = posixpath.join(root, path)

        def put() -> None:
            if not OBJECT_STORES.intersection(
                _protocols(fs)
            ):  # these have no folders, and s3fs would make the bucket
                fs.makedirs(posixpath.dirname(target), exist_ok=True)
            if "file" in _protocols(
                fs
            ):  # object stores put in one step; on a disk that takes a rename
                aside = f"{target}.{uuid.uuid4().hex}.part"
                fs.pipe_file(aside, data)
                os.replace(aside, target)
            else:
                fs.pipe_file(target, data)

        try:
            carry(put, self.url, "written")
        except FileNotFoundError as error:
            raise MpqError(
                f"The store {self.url} cannot be written ({why(error)}): check that it exists and that you may write to it."
            ) from None

    def _read(self, path: str, whole: Callable[[bytes], bool]) -> bytes:
        """The bytes of a file; fetched twice where they are not `whole`, since the way may have spoilt them, not the disk."""
        fs, root = self._open()
        try:
            for _ in range(1 if "file" in _protocols(fs) else 2):
                data = carry(
                    lambda: bytes(fs.cat_file(posixpath.join(root, path))), self.url, "read"
                )
                if whole(data):
                    break
        except FileNotFoundError:
            raise Damaged(f"{path} is not in the store") from None
        return data

    def files(self) -> dict[str, StoredFile]:
        """Every file under the URL, by its path in the store. Raises MpqError where the store cannot be listed."""
        fs, root = self._open()

        def listed() -> dict[str, Any]:
            fs.invalidate_cache()
            return dict(fs.find(root, detail=True))

        try:
            found = carry(listed, self.url, "read")
        except FileNotFoundError:
            return {}
        return {
            path.removeprefix(root).lstrip("/"): StoredFile(
                int(info.get("size") or 0), _modified(info)
            )
            for path, info in found.items()
            if info.get("type", "file") == "file"
        }

    def remove(self, path: str) -> None:
        """Delete one file; one that is gone already is no mistake."""
        fs, root = self._open()
        with suppress(FileNotFoundError):
            carry(lambda: fs.rm_file(posixpath.join(root, path)), self.url, "written")

    def check(self) -> None:
        """Write and delete a small file. Raises MpqError where that fails, before hours of work are spent."""
        name = f".mpq-check-{uuid.uuid4().hex}"
        self._write(name, b"")
        self.remove(name)

    def write_bytes(
        self,
        kind: str,
        key: str,
        data: bytes,
        suffix: str,
        *,
        rows: int = 0,
        upstream: tuple[str, ...] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> TableRef:
        """Store `data` under (kind, key) with its provenance; `upstream` are the keys that it was computed from."""
        ref = TableRef(
            kind,
            key,
            hashlib.sha256(data).hexdigest(),
            len(data),
            rows,
            suffix,
            tuple(upstream),
            self.url,
        )
        made = {
            "mpq": __version__,
            "host": platform.node(),
            "python": platform.python_version(),
            "written_unix_s": time.time(),
        }
        meta = {**asdict(ref), "provenance": {**made, **(provenance or {})}}
        meta.pop("store")  # an entry may be copied to another store
        folder = f"{kind}/{key}"
        self._write(f"{folder}/{ref.sha256}.{suffix}", data)
        self._write(f"{folder}/meta.json", json.dumps(meta, indent=1).encode())
        return ref

    def write_table(self, kind: str, key: str, frame: pl.DataFrame, **more: Any) -> TableRef:
        """Store a table as Parquet; see `write_bytes`."""
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="zstd")
        return self.write_bytes(kind, key, buffer.getvalue(), "parquet", rows=frame.height, **more)

    def read_bytes(self, ref: TableRef) -> bytes:
        """The data of an entry, its hash checked. Raises Damaged."""

        def whole(data: bytes) -> bool:
            return hashlib.sha256(data).hexdigest() == ref.sha256

        data = self._read(f"{ref.kind}/{ref.key}/{ref.sha256}.{ref.suffix}", whole)
        if not whole(data):
            raise Damaged(f"{ref.kind}/{ref.key[:12]} does not have the content that was written")
        return data

    def read_table(self, ref: TableRef) -> pl.DataFrame:
        """The table of an entry, its hash checked. Raises Damaged."""
        return pl.read_parquet(io.BytesIO(self.read_bytes(ref)))

    def meta(self, kind: str, key: str) -> dict[str, Any]:
        """An entry's provenance. Raises Damaged."""
        try:
            meta = json.loads(self._read(f"{kind}/{key}/meta.json", _is_json))
            return meta if isinstance(meta, dict) else {}
        except ValueError:
            raise Damaged(f"{kind}/{key[:12]}/meta.json is not JSON") from None

    def find_all(self, kind: str, keys: Iterable[str]) -> dict[str, TableRef]:
        """Those of the entries that are there, verified, by key; looked for at once."""
        keys = list(keys)
        with ThreadPoolExecutor(16) as pool:
            return {
                key: ref
                for key, ref in zip(keys, pool.map(lambda k: self.find(kind, k), keys), strict=True)
                if ref
            }

    def find(self, kind: str, key: str) -> TableRef | None:
        """The entry under (kind, key), verified; None where there is none. Damage is logged and counts as none."""
        try:
            meta = self.meta(kind, key)
        except Damaged as damage:
            if "not in the store" not in str(damage):
                log.warning("%s: computing it again", damage)
            return None
        try:
            fields = {
                name: meta[name]
                for name in ("kind", "key", "sha256", "bytes", "rows", "suffix", "upstream")
            }
            ref = TableRef(**{**fields, "upstream": tuple(fields["upstream"]), "store": self.url})
            self.read_bytes(ref)
        except (Damaged, KeyError, TypeError) as damage:
            log.warning("Damaged entry %s/%s (%s): computing it again", kind, key[:12], damage)
            return None
        return ref
