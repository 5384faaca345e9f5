"""Checkpoints, tokenizers and text: the one module that knows Hugging Face.

A checkpoint is a hub id, a local folder or an fsspec URL, always in Hugging Face layout with safetensors weights. Its
fingerprint is a hash of its weights and architecture: where it lies and what it is called do not matter.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import nn

from mpq.caches import private_folder
from mpq.devices import check_device
from mpq.errors import MpqError, first_line
from mpq.formats.format import get_format
from mpq.store.transport import carry, open_filesystem

log = logging.getLogger("mpq")

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model"]


def cache_folder() -> Path:
    """Where fetched checkpoints are kept, in this user's cache. Raises MpqError where others may write there."""
    return private_folder("checkpoints")


def fetch(path: str, revision: str | None = None) -> Path:
    """A local folder with the checkpoint's files, downloaded where needed.

    Raises MpqError where `path` is no folder, cannot be reached, or holds no config.json.
    """
    if "://" in path:
        folder = _fetch_url(path)
    elif Path(path).is_dir():
        folder = Path(path)
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise MpqError(
            f"No checkpoint at {path}: expected a folder with config.json and *.safetensors, a hub id or an fsspec URL."
        )
    else:
        folder = _fetch_hub(path, revision)
    if not (folder / "config.json").is_file():
        raise MpqError(f"{path} has no config.json: expected a checkpoint in Hugging Face layout.")
    return folder


def _fetch_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except Exception as error:  # the hub's client raises many kinds; all mean that it cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MpqError(
            f"{name} is no local folder and could not be fetched from the hub ({reason}): check the name, the network or HF_TOKEN."
        ) from None


def _fetch_url(url: str) -> Path:
    fs, root = open_filesystem(url, {}, "checkpoint")
    if "file" in fs.protocol:
        return Path(root)
    fs.invalidate_cache()  # a listing of before would give a replaced checkpoint's old copy

    def listed() -> dict[str, dict[str, Any]]:
        return {
            f: fs.info(f)
            for f in fs.ls(root, detail=False)
            if f.endswith((".safetensors", ".json", ".txt", ".model"))
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
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            for f, info in files.items():
                carry(
                    partial(_download, fs, f, Path(aside) / Path(f).name, info.get("size")),
                    url,
                    "read",
                    "checkpoint",
                )
            try:
                os.rename(aside, folder)
                Path(aside).mkdir()  # for TemporaryDirectory to remove
            except OSError:
                if not folder.is_dir():  # else another process was first with the same
                    raise
    return folder


def _download(fs: fsspec.AbstractFileSystem, file: str, to: Path, size: int | None) -> None:
    fs.get_file(file, str(to))
    if size is not None and to.stat().st_size != size:
        raise ConnectionError(f"{file} broke off after {to.stat().st_size} of {size} bytes")


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files in name order. Raises MpqError where there are none, or a listed one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [f for f in listed if not (folder / f).is_file()]:
            raise MpqError(
                f"{folder} lacks {missing[0]}, which its index lists: fetch the checkpoint again."
            )
        return [folder / f for f in listed]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MpqError(
            f"{folder} has no *.safetensors: expected a checkpoint in Hugging Face layout (convert .bin weights first)."
        )
    return files


def fingerprint(folder: Path) -> str:
    """SHA-256 over the checkpoint's architecture and weights; names and places left out, except the files' order."""
    digest = hashlib.sha256(json.dumps(_architecture(folder), sort_keys=True).encode())
    for file in weight_files(folder):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def fingerprint_of(folder: Path, patterns: Sequence[str]) -> str:
    """SHA-256 over the files of the checkpoint that match some pattern, their names included."""
    digest = hashlib.sha256()
    for file in sorted({f for p in patterns for f in folder.glob(p)}):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _architecture(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise MpqError(
            f"{folder / 'config.json'} is not JSON: fetch the checkpoint again."
        ) from None
    return {
        k: v
        for k, v in config.items()
        if k not in ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
    }


def load_config(folder: Path) -> Any:
    """The checkpoint's transformers configuration. Raises MpqError where transformers cannot read it."""
    from transformers import AutoConfig

    _architecture(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MpqError(
            f"{folder / 'config.json'} is not a model that transformers knows ({reason})."
        ) from None


def load_model(folder: Path, base: str, device: str = "cpu") -> nn.Module:
    """The model in its base format, in evaluation mode, without gradients on its parameters.

    Raises MpqError for a device that is not there and for weights that cannot be read, are missing or have the wrong shape: transformers would fill those
    with random numbers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    check_device(device)
    weight_files(folder)
    config = load_config(folder)
    shown = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, get_format(base).dtype),
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, json and torch each raise their own
        raise MpqError(
            f"The weights in {folder} cannot be loaded ({first_line(error)}): the checkpoint is damaged, fetch it again."
        ) from None
    finally:
        hf_logging.set_verbosity(shown)
    model, report = loaded
    wrong = [
        *report.get("missing_keys", ()),
        *(k[0] if isinstance(k, tuple) else k for k in report.get("mismatched_keys", ())),
    ]
    if wrong:
        raise MpqError(
            f"The weights in {folder} lack {sorted(wrong)[0]} (or have it in another shape) that config.json asks for: fetch it again."
        )
    model.eval().requires_grad_(False)
    return model.to(device)  # type: ignore[no-any-return]
