"""Folders of this user's own on this machine, for what is fetched or compiled once: $MPQ_CACHE, or `mpq` in the cache folder.

What lies there is loaded and run, so nobody else may be able to put it there. Links, owners and modes are looked at, not mended:
what was writable to others may hold anything.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from mpq.errors import MpqError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def private_folder(name: str) -> Path:
    """The folder `name` in this user's cache, made where it is not there.

    Raises MpqError where it, or the folder that it lies in, is a link, someone else's, writable to others, or cannot be made.
    """
    return _private(_cache(), name)


def private_temporary_folder(name: str) -> Path:
    """The same in the temporary folder, for what is one machine's alone, as locks are: a home folder may be on many machines."""
    return _private(Path(tempfile.gettempdir()) / f"mpq-{os.getuid()}", name)


def _cache() -> Path:
    if given := os.environ.get("MPQ_CACHE"):
        return Path(given).expanduser().absolute()
    given = os.environ.get("XDG_CACHE_HOME") or ""
    try:
        return (Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "mpq"
    except RuntimeError:  # no HOME, and a user whom the system does not know
        raise MpqError(
            "There is no home folder to keep a cache in: set MPQ_CACHE to a folder of yours."
        ) from None


def _private(base: Path, name: str) -> Path:
    folder = base / name
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for each in (base, folder):
            each.mkdir(mode=0o700, exist_ok=True)
            if fault := _fault(each):
                raise MpqError(
                    f"The folder {each} {fault}, so someone else may have put there what mpq would load: "
                    "take it away, or set MPQ_CACHE to a folder that only you can write to."
                )
    except (OSError, ValueError) as error:
        if isinstance(error, MpqError):
            raise
        raise MpqError(
            f"The folder {folder} cannot be made ({error}): set MPQ_CACHE to a folder of yours."
        ) from None
    return folder


def is_private_file(path: Path) -> bool:
    """Whether a regular file of this user's lies there, writable to nobody else; links are not followed."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return (
        stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & _OTHERS
    )


def _fault(folder: Path) -> str:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "is a link or no folder"
    if found.st_uid != os.getuid():
        return "belongs to someone else"
    return "is writable to others" if found.st_mode & _OTHERS else ""
