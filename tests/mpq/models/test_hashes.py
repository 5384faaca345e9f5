"""Hashes of large files: read once, named by the hub, read again where the file changed or somebody asks."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from mpq.errors import MpqError
from mpq.models import hashes
from mpq.models.hashes import content_hash


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The files that were read; every one counts as large, and those written before now as settled."""
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SMALL", 0)
    monkeypatch.setattr(hashes, "_SETTLED_S", 0.0)
    read: list[str] = []
    digest = hashlib.file_digest

    def noted(stream, algorithm):  # type: ignore[no-untyped-def]
        read.append(Path(stream.name).name)
        return digest(stream, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    return read


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_until_it_changes(reads: list[str], tmp_path: Path) -> None:
    """An unchanged file is not read again, wherever it is moved; other content of the same size and time is."""
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    time.sleep(0.01)  # the file system's clock ticks
    assert [content_hash(file) for _ in range(3)] == [_sha256(b"one")] * 3
    assert reads == ["w.safetensors"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "w").hardlink_to(file)  # a link changes the inode's time, so it is read again
    assert content_hash(tmp_path / "a" / "w") == _sha256(b"one")
    (tmp_path / "a").rename(tmp_path / "b")
    assert content_hash(tmp_path / "b" / "w") == _sha256(b"one")
    assert len(reads) == 2
    of = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(of.st_atime_ns, of.st_mtime_ns))
    assert content_hash(file) == _sha256(b"two")
    assert len(reads) == 3


def test_the_hub_says_what_its_blobs_hold(reads: list[str], tmp_path: Path) -> None:
    """A snapshot's file is taken at its blob's name, a SHA-256, unread; where it is another hash, or checked, it is read."""
    content = b"weights"
    names = {"lfs": _sha256(content), "git": hashlib.sha1(content).hexdigest()}
    (tmp_path / "m" / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file, name in names.items():
        (tmp_path / "m" / "blobs" / name).write_bytes(content)
        (snapshot / file).symlink_to(Path("..", "..", "blobs", name))
    assert content_hash(snapshot / "lfs") == names["lfs"]
    assert not reads
    assert content_hash(snapshot / "git") == _sha256(content)
    assert reads == ["git"]
    assert content_hash(snapshot / "lfs", check=True) == names["lfs"]
    assert len(reads) == 2
    (tmp_path / "m" / "blobs" / names["lfs"]).write_bytes(b"damaged")
    with pytest.raises(MpqError, match="damaged, delete it and fetch it again"):
        content_hash(snapshot / "lfs", check=True)


def test_fresh_and_small_files_are_read(
    reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is remembered of a file that was just written, since its time may not tell the next writing, nor of a small one."""
    file = tmp_path / "w"
    file.write_bytes(b"one")
    for name, value in (("_SETTLED_S", 60.0), ("SMALL", 2**20)):
        with monkeypatch.context() as patch:
            patch.setattr(hashes, name, value)
            before = len(reads)
            assert [content_hash(file) for _ in range(2)] == [_sha256(b"one")] * 2
            assert len(reads) == before + 2


def test_a_note_that_is_cut_off_is_none(reads: list[str], tmp_path: Path) -> None:
    """A damaged note about a file means that the file is read."""
    file = tmp_path / "w"
    file.write_bytes(b"one")
    time.sleep(0.01)
    content_hash(file)
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    for damage in ("", "[1", "7", "{}"):
        note.write_text(damage)
        assert content_hash(file) == _sha256(b"one")
    assert len(reads) == 5
