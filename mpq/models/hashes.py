"""The SHA-256 of large files without reading them each time: as the hub's cache names them, or as it was remembered.

In the hub's cache a file of a snapshot is a link to a blob that is named by its SHA-256 (huggingface_hub, "Understand
caching"; what is stored in git itself, small files, by git's own hash). Another file is read once. Its hash is remembered in
this user's cache by device, inode, size and the times of its last modification and change, of which the system sets the
latter at every write. Files that are quickly read are not worth it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path

from mpq.caches import private_folder
from mpq.errors import MpqError, first_line

SMALL = 64 * 2**20  # bytes that are read in no time
_SETTLED_S = (
    2.0  # a file written to since may be so again within one tick of the file system's clock
)


def content_hash(file: Path, check: bool = False) -> str:
    """SHA-256 of a file's content, in hexadecimal digits.

    With `check` the file is read whatever is known of it. Raises MpqError where it cannot be read, and where a check finds
    other content than the hub's name or the remembered hash says.
    """
    try:
        known = _known(file)
        if known and not check:
            return known
        before = file.stat()
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if known and found != known:
            raise MpqError(
                f"{file} does not hold any more what it held when it was written: it is damaged, delete it and fetch it again."
            )
        _remember(file, before, found)
    except OSError as error:
        raise MpqError(
            f"{file} cannot be read ({error.strerror or first_line(error)}): check its permissions and its disk."
        ) from None
    return found


def _known(file: Path) -> str:
    """What is known of the file's content unread; "" for nothing."""
    if file.is_symlink() and file.parent.parent.name == "snapshots":
        blob = Path(os.readlink(file))
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
            return blob.name
    of = file.stat()
    if of.st_size < SMALL:
        return ""
    try:
        *state, remembered = json.loads(_note(of).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return ""
    return str(remembered) if state == _state(of) else ""


def _remember(file: Path, before: os.stat_result, found: str) -> None:
    """Keep the hash of a file that nobody wrote to while it was read, nor shortly before."""
    settled = time.time() - max(before.st_mtime, before.st_ctime) > _SETTLED_S
    if before.st_size < SMALL or not settled or _state(file.stat()) != _state(before):
        return
    note = _note(before)
    aside = note.with_name(f"{note.name}.{os.getpid()}")
    aside.write_text(json.dumps([*_state(before), found]), encoding="utf-8")
    aside.replace(note)


def _state(of: os.stat_result) -> list[int]:
    return [of.st_size, of.st_mtime_ns, of.st_ctime_ns]


def _note(of: os.stat_result) -> Path:
    return private_folder("hashes") / f"{of.st_dev:x}-{of.st_ino:x}.json"
