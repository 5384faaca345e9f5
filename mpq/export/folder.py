"""The folder that an export ends in: complete or absent, and gone on with where it was cut off.

Everything is written in a folder beside it, which is renamed once it is whole. `progress.json` there says what the export
is of, and the SHA-256 of each shard that is done: the same export, started again, keeps those that are still right.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mpq.errors import MpqError, first_line
from mpq.folders import unwritable
from mpq.models.layout import TOKENIZER_FILES

RECORD = "export.json"  # beside the weights: what was exported, and what the check found
_PROGRESS = "progress.json"
_BESIDE = (  # how text becomes tokens, how the model generates, and under which licence
    *(name for name in TOKENIZER_FILES if name != "config.json"),
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class Asked:
    """What people called the folder and its replacement, for sentences about them."""

    out: str = "--out"
    overwrite: str = "--overwrite"


def check_target(out: Path, source: Path | None, overwrite: bool, asked: Asked = Asked()) -> None:
    """Raise MpqError unless the export may go to `out`: a folder that is not there, is empty, or an export to be replaced."""
    at, said = out.resolve(), f"{asked.out} {out}"
    if source is not None and (at == source.resolve() or at in source.resolve().parents):
        raise MpqError(f"{said} is where the checkpoint itself lies: give a folder of its own.")
    if os.path.lexists(out) and not out.is_dir():
        raise MpqError(f"{said} is no folder: give a folder that is not there yet.")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise MpqError(f"{said} is not empty: give another folder, or {asked.overwrite}.")
        if not (out / RECORD).is_file():
            raise MpqError(
                f"{said} holds something else than an export (no {RECORD}), which {asked.overwrite} does not replace: give another folder."
            )
    place = at.parent
    while not place.exists():
        place = place.parent
    if why := unwritable(place):
        raise MpqError(f"{said} cannot be written: {place} {why}.")


def holds(out: Path, key: str) -> bool:
    """Whether `out` is the export called `key`, every file that its record names as it was written."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        files = dict(record["files"])
        return bool(record["key"] == key) and all(
            _sha256(out / name) == digest for name, digest in files.items()
        )
    except (OSError, ValueError, TypeError, KeyError):
        return False


class Aside:
    """The folder beside `out` in which the export is written; `out` appears when it is finished.

    `key` says what the export is of: what another left there is removed.
    """

    def __init__(self, out: Path, key: str):
        self.out = out.resolve()
        self.folder = self.out.with_name(f".{self.out.name}.partial")
        self._key = key
        self._done: dict[str, str] = {}

    def begin(self) -> None:
        """Make the folder, or take it over with the shards that are done."""
        progress = self.folder / _PROGRESS
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            found = json.loads(progress.read_text(encoding="utf-8"))
            if found["of"] == self._key:
                self._done = dict(found["done"])
        if not self._done:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder.is_symlink() or self.folder.lstat().st_uid != os.getuid():
            raise MpqError(
                f"{self.folder}, in which the export is written, was put there by someone else: take it away."
            )

    def shard(self, name: str, write: Callable[[Path], None]) -> bool:
        """Have a shard written, unless it is there and right; whether it was written now."""
        file = self.folder / name
        if file.is_file() and self._done.get(name) == _sha256(file):
            return False
        part = file.with_name(f"{name}.part")
        part.touch()
        mode = part.stat().st_mode  # safetensors' own would let nobody else read it
        write(part)
        part.chmod(mode)
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, file)
        self._done[name] = _sha256(file)
        self._write(_PROGRESS, json.dumps({"of": self._key, "done": self._done}))
        return True

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each shard."""
        return dict(sorted(self._done.items()))

    def _write(self, name: str, text: str) -> None:
        part = self.folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.folder / name)

    def finish(self) -> None:
        """Rename the folder to `out`; what was there, an earlier export, is removed afterwards."""
        (self.folder / _PROGRESS).unlink(missing_ok=True)
        old = self.out.with_name(f".{self.out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.out.exists():
            os.rename(self.out, old)
        os.rename(self.folder, self.out)
        shutil.rmtree(old, ignore_errors=True)


def check_room(out: Path, needed: int) -> None:
    """Raise MpqError where the disk has less than `needed` bytes free."""
    place = out.resolve().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise MpqError(
            f"The export needs {needed / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB free: give --out on another disk."
        )


@contextmanager
def told(out: Path) -> Iterator[None]:
    """What the system says of writing, as one sentence: what is done stays, to be gone on with."""
    try:
        yield
    except MpqError:
        raise
    except Exception as error:  # safetensors wraps what the system says in an error of its own
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not (full or isinstance(error, OSError)):
            raise
        what = "the disk is full" if full else first_line(error)
        raise MpqError(
            f"The export to {out} was cut off ({what}): run it again once there is room, and it goes on where it was."
        ) from None


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Nobody else exports to `out` meanwhile. Raises MpqError where somebody does."""
    lock = out.resolve().with_name(f".{out.resolve().name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:  # where others may write, too: a link that someone put there is not followed
        opened = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MpqError(
            f"The lock {lock}, by which one export at a time goes to {out}, cannot be opened ({error.strerror}): take it away."
        ) from None
    with os.fdopen(opened) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MpqError(
                f"Another export to {out} is under way: wait for it, or give another folder."
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def copy_beside(source: Path, to: Path, code: bool) -> None:
    """Copy tokenizer, chat template, generation settings and licence; the checkpoint's own `code` where it needs it."""
    for pattern in (*_BESIDE, *(("*.py",) if code else ())):
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, to / file.name)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
