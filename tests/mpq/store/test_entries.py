"""An entry is what its own metadata says of it: another's, a mistyped or an unreadable one is told, never served."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
from small_store import FRAME

from mpq.errors import MpqError
from mpq.store.entries import Damaged, Store, TableRef


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store on a disk."""
    return Store(tmp_path.as_uri())


def meta_of(store: Store, ref: TableRef) -> Path:
    """The file with an entry's metadata."""
    return Path(store.url.removeprefix("file://")) / ref.kind / ref.key / "meta.json"


def change(path: Path, **fields: Any) -> None:
    """Other values in a metadata file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("what", ["kind", "key"])
def test_an_entry_of_another_kind_or_key_is_not_served(
    what: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder copied to another key or kind, whole in itself, is damage: its table answers another question."""
    right = store.write_table("gains", "k1", FRAME)
    other = store.write_table(
        "timing" if what == "kind" else "gains", "k1" if what == "kind" else "k2", FRAME.head(1)
    )
    here, there = meta_of(store, right).parent, meta_of(store, other).parent
    for file in there.iterdir():
        (here / file.name).write_bytes(file.read_bytes())
    with caplog.at_level(logging.WARNING, "mpq"):
        assert store.find("gains", "k1") is None
    assert f"belongs to {other.kind}/{other.key}" in caplog.text


def test_a_store_that_cannot_be_read_is_not_an_empty_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metadata that is there and cannot be read is an error, for one entry and for many: hours would be computed again."""
    monkeypatch.setenv("MPQ_STORE_ATTEMPTS", "1")
    ref = store.write_table("gains", "k1", FRAME)
    meta_of(store, ref).unlink()
    meta_of(store, ref).mkdir()
    with pytest.raises(MpqError, match="cannot be read"):
        store.find("gains", "k1")
    with pytest.raises(MpqError, match="cannot be read"):
        store.find_all("gains", ["k0", "k1"])
    assert store.find_all("gains", ["k0"]) == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"sha256": "../../../etc/passwd"},
        {"sha256": 1},
        {"suffix": "a/../../b"},
        {"bytes": "many"},
        {"bytes": -1},
        {"bytes": 7},
        {"rows": None},
        {"upstream": 5},
        {"upstream": ["../x"]},
        {"upstream": {"a": 1}},
        {"kind": ["gains"]},
    ],
)
def test_mistyped_metadata_is_damage(fields: dict[str, Any], store: Store) -> None:
    """Values of other types, and those that lead out of the store."""
    ref = store.write_table("gains", "k1", FRAME)
    change(meta_of(store, ref), **fields)
    assert store.find("gains", "k1") is None


def test_what_is_no_table_is_damage(store: Store) -> None:
    """Bytes that are whole by their hash and are no Parquet."""
    for data in (b"", b"PAR1", b"PAR1" + b"\xff" * 64 + b"PAR1", os.urandom(1000)):
        ref = store.write_bytes("gains", "k1", data, "parquet")
        with pytest.raises(Damaged, match="is not a table"):
            store.read_table(ref)


def test_what_is_found_stays_young(store: Store, tmp_path: Path) -> None:
    """An old entry that a run finds is written anew, so that it is not removed under its hands; a young one is left alone."""
    ref = store.write_table("gains", "k1", FRAME)
    meta, old = meta_of(store, ref), time.time() - 1e6
    os.utime(meta, (old, old))
    assert store.find("gains", "k1") == ref
    assert meta.stat().st_mtime == pytest.approx(old), "it says itself that it was written just now"
    change(meta, provenance={"written_unix_s": old})
    os.utime(meta, (old, old))
    assert store.find("gains", "k1") == ref
    assert time.time() - meta.stat().st_mtime < 1000
    os.utime(meta, (old, old))
    assert store.find("gains", "k1") == ref
    assert meta.stat().st_mtime == pytest.approx(old), "it was marked as used just now"


def test_what_cannot_be_written_is_found_all_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may only read uses what is there, however old."""
    ref = store.write_table("gains", "k1", FRAME)
    change(meta_of(store, ref), provenance=None)

    def refuse(*_: object) -> None:
        raise MpqError("read only")

    monkeypatch.setattr(Store, "_write", refuse)
    assert store.find("gains", "k1") == ref


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_the_stores_own_clock(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry's age is told by the storage's times: a machine whose clock is a day off finds the same, and leaves nothing."""
    store = Store(tmp_path.as_uri() if kind == "file" else f"memory://{tmp_path.name}")
    assert store.age_s("claims", "k1") is None
    ref = store.write_bytes("claims", "k1", b"{}", "json")
    clock = time.time
    monkeypatch.setattr("mpq.store.entries.time.time", lambda: clock() + 86400)
    age = store.age_s("claims", "k1")
    assert age is not None
    assert 0 <= age < 1000
    if kind == "file":
        long_ago = clock() - 500
        os.utime(meta_of(store, ref), (long_ago, long_ago))
        assert 499 <= (store.age_s("claims", "k1") or 0) < 1499
    assert len(store.files()) == 2
