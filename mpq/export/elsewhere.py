"""An export to where only fsspec reaches: made and checked on this machine, then sent, complete or not to be loaded.

Weights go first and `config.json` last, without which nothing loads the folder; a marker stays there until everything is. The
local copy lies in mpq's cache until it has been sent: cut off, the same export is sent again without being made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpq.errors import MpqError
from mpq.export.folder import RECORD, Asked
from mpq.store.transport import carry, open_filesystem

_MARKER = "upload.json"  # of a folder that is being written
_LAST = ("config.json", RECORD)


def is_elsewhere(out: str | Path) -> bool:
    """Whether that is a URL of another place than this machine's disks."""
    protocol, found, _ = str(out).partition("://")
    return bool(found) and protocol not in ("file", "local")


def local_path(out: str | Path) -> Path:
    """A folder of this machine, given by its path or as a file:// URL."""
    if "://" not in str(out):
        return Path(out).expanduser()
    return Path(open_filesystem(str(out), {}, "export")[1])


@dataclass(frozen=True)
class Elsewhere:
    """The folder at `url`. Each method raises MpqError where it cannot be reached."""

    url: str

    def check_target(self, overwrite: bool, asked: Asked = Asked()) -> None:
        """Raise MpqError unless an export may go there: nothing, what an upload left, or an export to be replaced."""
        there = self._names()
        if not there or _MARKER in there:
            return
        if not overwrite:
            raise MpqError(
                f"{asked.out} {self.url} is not empty: give another folder, or {asked.overwrite}."
            )
        if RECORD not in there:
            raise MpqError(
                f"{asked.out} {self.url} holds something else than an export (no {RECORD}), which {asked.overwrite} does not replace: give another folder."
            )

    def record(self) -> dict[str, Any]:
        """export.json there, empty where there is none; what its files are is not looked at, but that they are there."""
        fs, path = self._opened()
        there = self._names()
        if RECORD not in there or _MARKER in there:
            return {}
        try:
            found = json.loads(
                carry(lambda: fs.cat_file(f"{path}/{RECORD}"), self.url, "read", "export")
            )
        except (FileNotFoundError, ValueError):
            return {}
        whole = isinstance(found, dict) and set(found.get("files", ())) <= there
        return found if whole else {}

    def send(self, folder: Path) -> None:
        """The files of `folder`, in place of what is there."""
        fs, path = self._opened()
        files = sorted(
            folder.iterdir(), key=lambda f: (f.name in _LAST and _LAST.index(f.name) + 1, f.name)
        )

        def do(operation: Callable[[], Any]) -> None:
            carry(operation, self.url, "written", "export")

        do(lambda: fs.makedirs(path, exist_ok=True))
        do(lambda: fs.pipe_file(f"{path}/{_MARKER}", b"{}"))
        for stale in self._names() - {_MARKER}:
            do(partial(fs.rm_file, f"{path}/{stale}"))
        for file in files:
            do(partial(fs.put_file, str(file), f"{path}/{file.name}"))
        do(lambda: fs.rm_file(f"{path}/{_MARKER}"))

    def _opened(self) -> tuple[Any, str]:
        return open_filesystem(self.url, {}, "export")

    def _names(self) -> set[str]:
        fs, path = self._opened()
        fs.invalidate_cache()
        try:
            found = carry(lambda: fs.ls(path, detail=False), self.url, "read", "export")
        except FileNotFoundError:
            return set()
        return {str(name).rstrip("/").rpartition("/")[2] for name in found if str(name) != path}
