"""From what a checkpoint is called (hub id, folder, fsspec URL) to a local folder that holds its files."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from mpq.caches import private_folder
from mpq.errors import MpqError, first_line
from mpq.models.hashes import content_hash
from mpq.models.layout import INDEX, OTHER_LAYOUTS, is_weight_name, listed_weights
from mpq.store.transport import advice_of, carry, open_filesystem

_BESIDE = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]  # configuration, tokenizer
_MANIFEST = ".mpq-files.json"  # in a fetched copy: name → [bytes, SHA-256]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def cache_folder() -> Path:
    """Where fetched checkpoints are kept, in this user's cache. Raises MpqError where others may write there."""
    return private_folder("checkpoints")


def is_hub_id(path: str) -> bool:
    """Whether `path` may be a hub id (`gpt2`, `org/name`), given that it is no folder."""
    return bool(_HUB_ID.fullmatch(path)) and ".." not in path


def fetch(path: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """A local folder with the checkpoint's files, downloaded where needed; its code too, if that is trusted.

    Raises MpqError where `path` is no folder, cannot be reached, or holds no config.json.
    """
    folder = Path(path).expanduser()
    if "://" in path:
        folder = _fetch_url(path, trust_remote_code)
    elif not folder.is_dir():
        if folder.is_file():
            raise MpqError(
                f"{path} is a file: expected the folder that it lies in, with config.json and *.safetensors."
            )
        if not is_hub_id(path):
            raise MpqError(
                f"No checkpoint at {path}: expected a folder with config.json and *.safetensors, a hub id or an fsspec URL."
            )
        folder = _fetch_hub(path, revision, trust_remote_code)
    if not (folder / "config.json").is_file():
        raise MpqError(f"{path} has no config.json: expected a checkpoint in Hugging Face layout.")
    return folder


def _fetch_hub(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    beside = [*_BESIDE, *(["*.py"] if trust_remote_code else [])]
    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=beside, ignore_patterns=["*/*"]
            )
        )
    except Exception as error:  # the hub's client raises many kinds; all mean that it cannot be had
        raise _unreachable(name, error) from None
    # what the index lists, at the commit that it came from
    weights = listed_weights(folder) or ["*.safetensors"]
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    try:
        snapshot_download(
            name,
            revision=commit,
            allow_patterns=[*beside, *weights],
            ignore_patterns=["*/*", *OTHER_LAYOUTS],
        )
    except Exception as error:
        raise _unreachable(name, error) from None
    return folder


def _unreachable(name: str, error: Exception) -> MpqError:
    if advice := advice_of(error):
        return MpqError(
            f"{name} could not be fetched from the hub ({first_line(error)}): {advice}."
        )
    return MpqError(
        f"{name} is no local folder and could not be fetched from the hub ({first_line(error)}): check the name, the network or HF_TOKEN."
    )


def _fetch_url(url: str, trust_remote_code: bool) -> Path:
    fs, root = open_filesystem(url, {}, "checkpoint")
    if "file" in fs.protocol:
        return Path(root)
    fs.invalidate_cache()  # a listing of before would give a replaced checkpoint's old copy
    patterns = [*_BESIDE, *(["*.py"] if trust_remote_code else [])]

    def listed() -> dict[str, dict[str, Any]]:
        return {
            name: fs.info(file)
            for file in fs.ls(root, detail=False)
            if _matches(name := Path(file).name, patterns) or is_weight_name(name)
        }

    try:
        files = carry(listed, url, "read", "checkpoint")
    except FileNotFoundError:
        raise MpqError(
            f"There is no checkpoint at {url}: expected an fsspec URL of a folder."
        ) from None
    # a copy is as good as its listing: names, sizes and the store's own version marks
    marks = {
        f: [
            i.get("size"),
            str(i.get("ETag") or i.get("etag") or i.get("mtime") or i.get("created")),
        ]
        for f, i in files.items()
    }
    folder = (
        cache_folder()
        / hashlib.sha256(json.dumps([url, marks], sort_keys=True).encode()).hexdigest()[:32]
    )
    if folder.is_dir() and not _whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            _copy(fs, root, files, url, Path(aside))
            try:
                os.rename(aside, folder)
                Path(aside).mkdir()  # for TemporaryDirectory to remove
            except OSError:
                if not folder.is_dir():  # else another process was first with the same
                    raise
    return folder


def _copy(
    fs: fsspec.AbstractFileSystem,
    root: str,
    files: dict[str, dict[str, Any]],
    url: str,
    to: Path,
) -> None:
    """Download the small files, then the weights that the index among them lists; write down what was received."""

    def take(names: Iterable[str]) -> None:
        for name in names:
            size = files[name].get("size")
            source = f"{root.rstrip('/')}/{name}"
            carry(partial(_download, fs, source, to / name, size), url, "read", "checkpoint")

    take(name for name in files if not is_weight_name(name))
    index = listed_weights(to) if (to / INDEX).is_file() else None
    take(name for name in files if is_weight_name(name) and (index is None or name in index))
    manifest = {f.name: [f.stat().st_size, content_hash(f)] for f in sorted(to.iterdir())}
    (to / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _download(fs: fsspec.AbstractFileSystem, file: str, to: Path, size: int | None) -> None:
    fs.get_file(file, str(to))
    if size is not None and to.stat().st_size != size:
        raise ConnectionError(f"{file} broke off after {to.stat().st_size} of {size} bytes")


def _whole(folder: Path) -> bool:
    """Whether a copy still holds what was downloaded into it: a truncated one is not to be taken for ever."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == size and content_hash(folder / name) == digest
            for name, (size, digest) in manifest.items()
        )
    except (OSError, ValueError, TypeError, AttributeError, MpqError):
        return False


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
