"""Which checkpoints lie under a folder, an fsspec URL or a hub id, and whether they are still being written."""

from __future__ import annotations

import os
import posixpath
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from mpq.errors import MpqError
from mpq.models.fetching import is_hub_id
from mpq.store.transport import carry, open_filesystem


@dataclass(frozen=True)
class Found:
    """A checkpoint: where it is, and the marks of its files (name, size, version), empty for a hub id."""

    path: str
    marks: tuple[tuple[str, int, str], ...] = ()


def checkpoints(urls: Iterable[str]) -> list[Found]:
    """The checkpoints under each of `urls`: itself where it holds a config.json, else its sub-folders that do.

    What is neither a folder nor a URL is taken for a hub id. Raises MpqError where a URL cannot be listed.
    """
    found: dict[str, Found] = {}
    for given in urls:
        url = given if "://" in given else os.path.expanduser(given)
        if "://" not in url and not Path(url).exists():
            if not is_hub_id(url):
                raise MpqError(
                    f"Nothing to watch at {url}: expected a folder, an fsspec URL or a hub id such as org/name."
                )
            found[url] = Found(url)
        else:
            found.update({f.path: f for f in _under(url)})
    return [found[path] for path in sorted(found)]


def settled(urls: Iterable[str], seconds: float) -> tuple[list[Found], list[Found]]:
    """The checkpoints whose files stayed the same for `seconds`, and those that are still being written."""
    urls = list(urls)
    first = checkpoints(urls)
    if seconds > 0 and any(f.marks for f in first):
        time.sleep(seconds)
        before, first = set(first), checkpoints(urls)
        return [f for f in first if f in before], [f for f in first if f not in before]
    return first, []


def _under(url: str) -> list[Found]:
    fs, root = open_filesystem(url, {}, "folder")
    try:
        return carry(partial(_listed, fs, root, url), url, "read", "folder")
    except FileNotFoundError:
        raise MpqError(
            f"There is nothing to watch at {url}: expected a folder or an fsspec URL."
        ) from None


def _listed(fs: fsspec.AbstractFileSystem, root: str, url: str) -> list[Found]:
    fs.invalidate_cache()
    top = fs.ls(root, detail=True)
    folders = [root] if _has_config(top) else [e["name"] for e in top if e["type"] == "directory"]
    found = []
    for folder in folders:
        entries = top if folder == root else fs.ls(folder, detail=True)
        if _has_config(entries):
            name = folder if "://" not in url else str(fs.unstrip_protocol(folder))
            found.append(
                Found(name, tuple(sorted(_mark(e) for e in entries if e["type"] == "file")))
            )
    return found


def _has_config(entries: list[dict[str, Any]]) -> bool:
    return any(posixpath.basename(e["name"]) == "config.json" for e in entries)


def _mark(entry: dict[str, Any]) -> tuple[str, int, str]:
    version = next(
        (entry[k] for k in ("ETag", "etag", "mtime", "LastModified", "created") if entry.get(k)), ""
    )
    return posixpath.basename(entry["name"]), int(entry.get("size") or 0), str(version)
