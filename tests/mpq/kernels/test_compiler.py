"""What is compiled, by which command, what of it is loaded again, and what a device is called where that fails."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpq.kernels import compiler, device_name, int8_attention, int8_linear, rows

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="this machine has no g++")


@pytest.fixture
def fresh() -> Iterator[None]:
    """No kernel is loaded yet, and none stays loaded in the way of this test."""
    functions = [
        rows.passes,
        int8_attention.available,
        int8_attention._library,
        int8_linear.available,
        int8_linear._library,
    ]
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small C++ file, and an empty cache."""
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }')
    return tmp_path / "one.cpp"


def test_cxx_is_a_command(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$CXX is split as a shell splits it, so that a wrapper and its compiler are two words; open quotes are an OSError."""
    for command in ("env g++", f"'{shutil.which('env')}'  g++ -DX='a b'"):
        monkeypatch.setenv("CXX", command)
        assert compiler.compiled(source).one() == 1
    monkeypatch.setenv("CXX", "'g++")
    with pytest.raises(OSError, match="CXX"):
        compiler.compiled(source)


@pytest.mark.parametrize("wrong", ["no command", "no library", "open folder"])
@pytest.mark.usefixtures("fresh")
def test_a_device_without_its_kernels_is_another_one(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever keeps the kernels from being loaded (a folder without execution, a compiler that fails), times get another name."""
    whole, loaded = device_name("cpu"), functools.partial(monkeypatch.setenv, "CXX")
    assert "without" not in whole
    for function in (rows.passes, int8_attention.available, int8_attention._library):
        function.cache_clear()
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    if wrong == "no command":
        loaded("/no/such/compiler")
    elif wrong == "no library":  # as where the folder is mounted noexec: compiled, and not loaded
        fake = tmp_path / "fake"
        fake.write_text('#!/bin/sh\nfor last; do :; done\necho none > "$last"\n')
        fake.chmod(0o700)
        loaded(str(fake))
    else:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o777)
    told = device_name("cpu")
    assert "without rows" in told
    assert told != whole


@pytest.mark.parametrize("how", ["link", "mode", "garbage"])
def test_a_planted_library_is_not_loaded(how: str, source: Path, tmp_path: Path) -> None:
    """A library that is a link or that others may write to is compiled again, not loaded; ours is loaded as it is."""
    compiler.compiled(source)
    (ours,) = (tmp_path / "cache" / "kernels").glob("*.so")
    made = ours.stat().st_ino
    compiler.compiled(source)
    assert ours.stat().st_ino == made
    assert not ours.stat().st_mode & 0o077
    planted = tmp_path / "planted.so"
    ours.rename(planted)
    if how == "link":
        ours.symlink_to(planted)
    else:
        ours.write_bytes(planted.read_bytes() if how == "mode" else b"garbage")
        ours.chmod(0o777)
    assert compiler.compiled(source).one() == 1
    assert not ours.is_symlink()
    assert not ours.stat().st_mode & 0o022


def test_an_open_folder_is_not_used(source: Path, tmp_path: Path) -> None:
    """Nothing is loaded from a folder that others may write to, though it is this user's."""
    compiler.compiled(source)
    (tmp_path / "cache" / "kernels").chmod(0o777)
    with pytest.raises(OSError, match="writable to others"):
        compiler.compiled(source)
