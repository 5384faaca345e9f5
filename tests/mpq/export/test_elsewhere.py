"""Exports to a URL: sent when they are whole and checked, complete or not to be loaded, sent again where that was cut off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from small_export import checkpoint, linears, mixed, plan_of

from mpq.errors import MpqError
from mpq.export import writing
from mpq.export.elsewhere import Elsewhere
from mpq.export.exporting import export
from mpq.program.plan import Plan

URL = "memory://served/one"


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing is in the memory's file system, and the cache is the test's own."""
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MPQ_STORE_ATTEMPTS", "1")
    yield
    if fsspec.filesystem("memory").exists("/served"):
        fsspec.filesystem("memory").rm("/served", recursive=True)


@pytest.fixture
def asked(tmp_path: Path) -> tuple[Plan, Path]:
    """A plan and its checkpoint."""
    source = checkpoint(tmp_path / "model")
    return plan_of(source, mixed(linears(source))), source


def names() -> set[str]:
    """What is at the URL."""
    found = fsspec.filesystem("memory").ls("/served/one", detail=False)
    return {str(name).rpartition("/")[2] for name in found}


def test_sent(asked: tuple[Plan, Path], tmp_path: Path) -> None:
    """The files at the URL are, byte for byte, those of an export to a folder; nothing stays in the cache."""
    made = export(*asked, URL)
    export(*asked, tmp_path / "out")
    assert made.folder == URL
    assert names() == {file.name for file in (tmp_path / "out").iterdir()}
    weights = fsspec.filesystem("memory").cat_file("/served/one/model.safetensors")
    assert weights == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert not list((tmp_path / "cache" / "exports").iterdir())


def test_not_over_what_is_there(asked: tuple[Plan, Path]) -> None:
    """An export is replaced when that is asked for, other people's files never."""
    export(*asked, URL)
    with pytest.raises(MpqError, match="not empty"):
        export(*asked, URL)
    fsspec.filesystem("memory").pipe_file("/served/one/stale.safetensors", b"old")
    export(*asked, URL, overwrite=True)
    assert "stale.safetensors" not in names()
    fsspec.filesystem("memory").rm_file("/served/one/export.json")
    with pytest.raises(MpqError, match="something else than an export"):
        export(*asked, URL, overwrite=True)


def test_cut_off_and_sent_again(asked: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off while it is sent there is no config.json, so nothing loads it; the same command sends it, and makes nothing anew."""
    memory = type(fsspec.filesystem("memory"))
    put = memory.put_file

    def cut(self: object, source: str, to: str, **how: object) -> None:
        if to.endswith("plan.json"):
            raise ConnectionResetError("the line is dead")
        put(self, source, to, **how)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "put_file", cut)
        with pytest.raises(MpqError, match=r"cannot be written .*the line is dead"):
            export(*asked, URL)
    assert "model.safetensors" in names()
    assert "config.json" not in names()
    assert Elsewhere(URL).record() == {}
    monkeypatch.setattr(writing, "Writing", None)  # would fail, were it made again
    made = export(*asked, URL)
    assert made.formats == {"int8": 8, "fp8_e4m3": 6}
    assert "config.json" in names()
    assert Elsewhere(URL).record()["plan"] == made.plan


def test_a_file_url_is_a_folder(asked: tuple[Plan, Path], tmp_path: Path) -> None:
    """file:// names a folder of this machine."""
    export(*asked, (tmp_path / "out").as_uri())
    assert (tmp_path / "out" / "config.json").is_file()
