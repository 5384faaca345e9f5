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
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from datetime import datetime
from typing import Any

import fsspec
import polars as pl

from mpq import __version__
from mpq.documents import parse_json
from mpq.errors import MpqError, first_line
from mpq.store.transport import OBJECT_STORES, carry, open_filesystem, refuse_credentials, why

log = logging.getLogger("mpq")
_USED = "used_unix_s"  # in meta.json: when a run last found the entry, by that run's clock
_MARKED_AGAIN_S = 6 * 3600.0  # a quarter of what `mpq store gc` leaves alone


class Damaged(Exception):
    """An entry is missing, cut short or altered. Stages answer it by computing again, with a warning."""


class Missing(Damaged):
    """A file is not there, which the storage says itself."""


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

    @classmethod
    def of(cls, fields: Any, **more: Any) -> TableRef:
        """The reference that a JSON mapping describes, `more` in place of its own. Raises ValueError where it describes none."""
        try:
            given = {**fields, **more}
            ref = cls(**{f.name: given[f.name] for f in dataclass_fields(cls) if f.name in given})
        except TypeError:
            raise ValueError(
                f"expected a mapping with {', '.join(f.name for f in dataclass_fields(cls))}"
            ) from None
        for name, is_right in _FIELDS.items():
            if not is_right(getattr(ref, name)):
                raise ValueError(f"{name} is {_shown(getattr(ref, name))}")
        return replace(ref, upstream=tuple(ref.upstream))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


# a kind and a key are folders: none leads out of the store
_NAME = re.compile(r"\w[\w.-]{0,254}", re.ASCII)
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "kind": _is_name,
    "key": _is_name,
    "sha256": lambda v: isinstance(v, str) and bool(re.fullmatch(r"[0-9a-f]{64}", v)),
    "bytes": _is_count,
    "rows": _is_count,
    "suffix": lambda v: isinstance(v, str) and bool(re.fullmatch(r"\w{1,32}", v, re.ASCII)),
    "upstream": lambda v: isinstance(v, list | tuple) and all(map(_is_name, v)),
    "store": lambda v: isinstance(v, str) and _is_text(v),
}


def _is_text(value: str) -> bool:
    """Whether it can be a path: JSON's strings may hold halves of characters, which no encoding has."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= 40 else text[:39] + "…"


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
        parse_json(data)
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
            protocols = _protocols(fs)
            # object stores have no folders, and s3fs would make the bucket
            if not OBJECT_STORES & protocols:
                fs.makedirs(posixpath.dirname(target), exist_ok=True)
            # they put in one step; on a disk that takes a rename
            if "file" in protocols:
                aside = f"{target}.{uuid.uuid4().hex}.part"
                try:
                    fs.pipe_file(aside, data)
                    os.replace(aside, target)
                except BaseException:
                    with suppress(OSError):  # half a file would keep a full disk full
                        os.unlink(aside)
                    raise
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
            raise Missing(f"{path} is not in the store") from None
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
        try:
            return pl.read_parquet(io.BytesIO(self.read_bytes(ref)))
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise Damaged(
                f"{ref.kind}/{ref.key[:12]} is not a table ({first_line(error)})"
            ) from None

    def meta(self, kind: str, key: str) -> dict[str, Any]:
        """An entry's metadata as it lies there: JSON of any content. Raises Missing, or Damaged where it is no mapping."""
        data = self._read(f"{kind}/{key}/meta.json", _is_json)
        try:
            meta = parse_json(data)
        except ValueError as error:
            raise Damaged(f"{kind}/{key[:12]}/meta.json is not JSON ({error})") from None
        if not isinstance(meta, dict):
            raise Damaged(f"{kind}/{key[:12]}/meta.json is not a mapping")
        return meta

    def reference(self, kind: str, key: str, meta: Mapping[str, Any]) -> TableRef:
        """The reference that `meta` describes. Raises Damaged where it describes none, or another entry's: it was copied here."""
        try:
            ref = TableRef.of(meta, store=self.url)
        except ValueError as error:
            raise Damaged(f"{kind}/{key[:12]}/meta.json describes no table: {error}") from None
        if (ref.kind, ref.key) != (kind, key):
            raise Damaged(f"{kind}/{key[:12]}/meta.json belongs to {ref.kind}/{ref.key[:12]}")
        return ref

    def find_all(self, kind: str, keys: Iterable[str]) -> dict[str, TableRef]:
        """Those of the entries that are there, verified, by key; looked for at once."""
        keys = list(keys)
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(lambda key: self.find(kind, key), keys)
            return {key: ref for key, ref in zip(keys, found, strict=True) if ref}

    def find(self, kind: str, key: str) -> TableRef | None:
        """The entry under (kind, key), verified; None where there is none. Damage is logged and counts as none.

        Raises MpqError where the store cannot say: an entry that cannot be read is not one that is not there.
        """
        try:
            try:
                meta = self.meta(kind, key)
            except Missing:
                return None
            ref = self.reference(kind, key, meta)
            if len(self.read_bytes(ref)) != ref.bytes:
                raise Damaged(f"{kind}/{key[:12]}/meta.json tells another size")
        except Damaged as damage:
            log.warning("Damaged entry: %s; computing it again", damage)
            return None
        self._mark_used(kind, key, meta)
        return ref

    def _mark_used(self, kind: str, key: str, meta: dict[str, Any]) -> None:
        """Write `meta.json` anew where it is old, so that `mpq store gc` sees that a run is using what it found."""
        made = meta.get("provenance")
        times = (meta.get(_USED), made.get("written_unix_s") if isinstance(made, dict) else None)
        last = max((t for t in times if isinstance(t, int | float)), default=0.0)
        now = time.time()
        # no difference is taken: JSON has integers of any size
        if now - _MARKED_AGAIN_S < last < now + _MARKED_AGAIN_S:
            return
        marked = json.dumps({**meta, _USED: now}, indent=1).encode()
        try:
            self._write(f"{kind}/{key}/meta.json", marked)
        except MpqError as error:  # who may only read uses what is there all the same
            log.debug("%s", error)

    def now(self) -> float:
        """What time it is by the store's own clock (Unix seconds), which is the one that its files' times are of.

        Raises MpqError where the store cannot be written: the time is that of a small file, which is removed again.
        """
        name = f".mpq-clock-{uuid.uuid4().hex}"
        self._write(name, b"")
        try:
            return self._modified_unix_s(name)
        except FileNotFoundError:
            raise MpqError(
                f"The store {self.url} loses what is written to it: a small file was gone at once."
            ) from None
        finally:
            self.remove(name)

    def age_s(self, kind: str, key: str) -> float | None:
        """Seconds since the entry was written, by the store's own clock; None where there is no entry.

        No machine's own clock is in it: of two machines that look, both find the same. Raises MpqError as `now` does.
        """
        try:
            written = self._modified_unix_s(f"{kind}/{key}/meta.json")
        except FileNotFoundError:
            return None
        return self.now() - written

    def _modified_unix_s(self, path: str) -> float:
        fs, root = self._open()

        def info() -> Mapping[str, Any]:
            fs.invalidate_cache()
            return dict(fs.info(posixpath.join(root, path)))

        return _modified(carry(info, self.url, "read"))
