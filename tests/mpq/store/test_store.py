"""The store: whole entries or none, damage noticed, keys that follow content."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
from pathlib import Path

import polars as pl
import pytest

from mpq.errors import MpqError
from mpq.store import code
from mpq.store.code import code_version
from mpq.store.entries import Damaged, Store, TableRef, content_key

FRAME = pl.DataFrame({"op": ["a", "b"], "gain_s": [1.0, 2.5]})


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store on a disk and one in memory."""
    return Store(tmp_path.as_uri() if request.param == "file" else f"memory://{tmp_path.name}")


def _data_file(tmp_path: Path, ref: TableRef) -> Path:
    return tmp_path / ref.kind / ref.key / f"{ref.sha256}.parquet"


def test_round_trip(store: Store) -> None:
    """A table written is found and read back equal, with its provenance."""
    ref = store.write_table("gains", "k1", FRAME, upstream=("k0",), provenance={"stage": "gains"})
    assert store.find("gains", "k1") == ref
    assert store.read_table(ref).equals(FRAME)
    meta = store.meta("gains", "k1")
    assert meta["upstream"] == ["k0"]
    assert meta["provenance"]["stage"] == "gains"


def test_nothing_there(store: Store) -> None:
    """An unknown key is no entry; a reference to it is damaged."""
    assert store.find("gains", "nope") is None
    with pytest.raises(Damaged):
        store.read_bytes(TableRef("gains", "nope", "0" * 64, 0, 0))


@pytest.mark.parametrize("damage", ["same size", "cut", "gone", "meta"])
def test_damage_is_noticed(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Altered, cut or missing data and broken metadata count as no entry, with a warning."""
    store = Store(tmp_path.as_uri())
    ref = store.write_table("gains", "k", FRAME)
    path = _data_file(tmp_path, ref)
    data = path.read_bytes()
    if damage == "same size":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(data[:10])
    elif damage == "gone":
        path.unlink()
    else:
        (path.parent / "meta.json").write_text("{")
    with caplog.at_level(logging.WARNING, "mpq"):
        assert store.find("gains", "k") is None
    assert "computing it again" in caplog.text
    again = store.write_table("gains", "k", FRAME)
    assert store.read_table(again).equals(FRAME)


def test_no_half_written_entry(tmp_path: Path) -> None:
    """A writer killed between data and metadata leaves no entry; the data file alone is never served."""
    store = Store(tmp_path.as_uri())
    ref = store.write_table("gains", "k", FRAME)
    (tmp_path / "gains" / "k" / "meta.json").unlink()
    assert store.find("gains", "k") is None
    assert not list(tmp_path.rglob("*.part"))
    assert store.read_table(ref).equals(
        FRAME
    )  # who holds the reference may read it: its content is proven by its hash


def test_two_writers_of_one_key(store: Store) -> None:
    """Different content under one key: readers see the one or the other, whole."""
    first = store.write_table("gains", "k", FRAME)
    second = store.write_table("gains", "k", FRAME.head(1))
    assert store.find("gains", "k") == second
    assert store.read_table(first).height == 2


def test_an_entry_survives_a_move(tmp_path: Path) -> None:
    """A store copied elsewhere serves the same entries."""
    Store((tmp_path / "a").as_uri()).write_table("gains", "k", FRAME)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = Store((tmp_path / "b").as_uri())
    found = moved.find("gains", "k")
    assert found is not None
    assert moved.read_table(found).equals(FRAME)


@pytest.mark.parametrize("url", ["s4://bucket/x", "file:///proc/nope/x"])
def test_unreachable_store(url: str) -> None:
    """A store that cannot be opened or written is one sentence."""
    with pytest.raises(MpqError, match=r"^The store .* cannot be .*\.$"):
        Store(url).check()


def test_key_follows_content() -> None:
    """Keys ignore the order of mappings and change with any value."""
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    assert content_key("ab", "c") != content_key("a", "bc")
    with pytest.raises(TypeError):
        content_key(object())


def test_code_version_is_the_source() -> None:
    """The code part of a key is a hash over the modules' source."""
    assert code_version("mpq.program.solver") != code_version("mpq.program.gains")
    assert len(code_version("mpq.program.solver", "mpq.program.gains")) == 64


def test_code_version_sees_the_cpp_beside_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed kernel.cpp changes the key of what kernel.py computes, as a changed kernel.py does."""
    monkeypatch.syspath_prepend(tmp_path)
    versions = []
    for python, native in (("x = 1", "int x;"), ("x = 1", "int y;"), ("x = 2", "int y;")):
        (tmp_path / "kernel_of_test.py").write_text(python)
        (tmp_path / "kernel_of_test.cpp").write_text(native)
        for kept in (code._spec, code._source, code._imports_of):
            kept.cache_clear()
        versions.append(code_version("kernel_of_test"))
    assert len(set(versions)) == 3


def test_code_version_sees_the_constants_that_a_function_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed constant changes the key of the function that reads it, one that it does not read changes none."""
    monkeypatch.syspath_prepend(tmp_path)
    versions = []
    for i, (used, other) in enumerate(((1, 1), (1, 2), (2, 2))):
        name = f"constant_of_test_{i}"
        text = f"USED: int = {used}\nOTHER = {other}\n\n\ndef function():\n    return USED\n"
        (tmp_path / f"{name}.py").write_text(text)
        versions.append(code_version(importlib.import_module(name).function))
    assert versions[0] == versions[1] != versions[2]


def test_meta_holds_no_store_url(tmp_path: Path) -> None:
    """Where a table lies is no part of it: credentials in a URL cannot leak into metadata."""
    store = Store(tmp_path.as_uri())
    store.write_table("gains", "k", FRAME)
    meta = json.loads((tmp_path / "gains" / "k" / "meta.json").read_text())
    assert tmp_path.as_posix() not in json.dumps(meta)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "the disk is full; make room"),
        (errno.EDQUOT, "quota there is used up"),
        (errno.EROFS, "mounted read-only"),
        (errno.EMFILE, "too many files open"),
        (errno.EACCES, "check that it exists and that you may write"),
    ],
)
def test_each_failure_of_a_disk_has_its_own_advice(
    number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is not told as one that is not there."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(MpqError, match=rf"{os.strerror(number)}\): .*{advice}"):
        Store(tmp_path.as_uri()).check()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own error, as it comes through fsspec; the half file does not stay."""
    from fsspec.implementations.local import LocalFileSystem

    def full(self: LocalFileSystem, path: str, data: bytes) -> None:
        Path(path).write_bytes(b"")
        Path("/dev/full").write_bytes(data)

    monkeypatch.setattr(LocalFileSystem, "pipe_file", full)
    with pytest.raises(MpqError, match="the disk is full"):
        Store(tmp_path.as_uri()).write_table("gains", "k", FRAME)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
