"""What is loaded from a cache was put there by this user: links, modes and owners are looked at."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mpq.caches import is_private_file, private_folder, private_temporary_folder
from mpq.errors import MpqError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is not there yet."""
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_made_for_the_user_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of mode 700 under $MPQ_CACHE, whatever the umask; without it in $XDG_CACHE_HOME or ~/.cache."""
    before = os.umask(0)
    try:
        assert private_folder("kernels") == cache / "kernels"
    finally:
        os.umask(before)
    assert stat.S_IMODE((cache / "kernels").stat().st_mode) == 0o700
    monkeypatch.delenv("MPQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "xdg"))
    assert private_folder("kernels") == cache / "xdg" / "mpq" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(cache / "home"))
    assert private_folder("kernels") == cache / "home" / ".cache" / "mpq" / "kernels"


@pytest.mark.parametrize("which", ["base", "folder"])
@pytest.mark.parametrize("how", ["link", "file", "mode", "group"])
def test_what_others_may_write_is_refused(which: str, how: str, cache: Path) -> None:
    """A link, a file, a folder writable to all or to a group, at either level: one sentence, and nothing is mended."""
    folder = cache if which == "base" else cache / "kernels"
    folder.parent.mkdir(exist_ok=True, mode=0o700)
    if how == "link":
        (cache.parent / "elsewhere").mkdir()
        folder.symlink_to(cache.parent / "elsewhere")
    elif how == "file":
        folder.write_bytes(b"")
    else:
        folder.mkdir()
        folder.chmod(0o777 if how == "mode" else 0o770)
    with pytest.raises(MpqError, match=r"^The folder .*MPQ_CACHE.*\.$"):
        private_folder("kernels")
    if how in ("mode", "group"):
        assert stat.S_IMODE(folder.stat().st_mode) & 0o022


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_what_belongs_to_others_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign folder, in the cache and in the temporary folder, and a foreign file."""
    private_folder("kernels").chmod(0o700)
    os.chown(cache / "kernels", 12345, -1)
    with pytest.raises(MpqError, match="belongs to someone else"):
        private_folder("kernels")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    os.chown(private_temporary_folder("locks").parent, 12345, -1)
    with pytest.raises(MpqError, match="belongs to someone else"):
        private_temporary_folder("locks")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "file").chmod(0o700)
    assert is_private_file(tmp_path / "file")
    os.chown(tmp_path / "file", 12345, -1)
    assert not is_private_file(tmp_path / "file")


def test_files(tmp_path: Path) -> None:
    """A regular file of ours, not writable to others; no link, no folder, nothing."""
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"")
    file.chmod(0o700)
    link.symlink_to(file)
    assert is_private_file(file)
    assert not is_private_file(link)
    assert not is_private_file(tmp_path)
    assert not is_private_file(tmp_path / "none")
    file.chmod(0o722)
    assert not is_private_file(file)


@pytest.mark.parametrize("name", ["/proc/none/cache", "a\0b"])
def test_no_cache_at_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder can be made, a sentence says which variable names another."""
    monkeypatch.setattr("os.environ", {**os.environ, "MPQ_CACHE": name})
    with pytest.raises(MpqError, match=r"cannot be made \(.*\): set MPQ_CACHE"):
        private_folder("kernels")
