"""A checkpoint's files where a task runs, which may be another machine than the flow's."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from mpq.errors import MpqError


def source_of(path: str, revision: str | None, folder: Path, shared: bool) -> str:
    """What to hand to tasks: the flow's `folder`, or where tasks run elsewhere what each machine can fetch for itself.

    A local folder stays one: on a cluster it must lie on a file system that every worker has.
    """
    if not shared or Path(path).is_dir():
        return str(folder.absolute())
    return path if "://" in path else f"{path}@{revision or ''}"


@lru_cache(maxsize=8)
def at_hand(source: str, fingerprint: str = "") -> Path:
    """A local folder with the checkpoint that `source` (see `source_of`) names, fetched once a process.

    Raises MpqError where it cannot be had, or is not the one with this fingerprint any more.
    """
    from mpq.models.checkpoint import fetch
    from mpq.models.checkpoint import fingerprint as fingerprint_of_folder

    if Path(source).is_dir():
        return Path(source)
    path, _, revision = (source, "", "") if "://" in source else source.partition("@")
    folder = fetch(path, revision or None)
    if fingerprint and fingerprint_of_folder(folder) != fingerprint:
        raise MpqError(
            f"{path} has changed since the run began: run it again for the new checkpoint."
        )
    return folder
