"""Checkpoints: their content and their configuration; loading.py has the model in them.

A checkpoint is a hub id, a local folder or an fsspec URL, always in Hugging Face layout with safetensors weights. Its
fingerprint is a hash of its weights and architecture: where it lies and what it is called do not matter.

The code that a checkpoint may bring along never runs unless the caller trusts it by `trust_remote_code`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpq.errors import MpqError, first_line
from mpq.models.fetching import cache_folder as cache_folder
from mpq.models.fetching import fetch as fetch
from mpq.models.hashes import content_hash
from mpq.models.layout import read_config, weight_files
from mpq.models.quantized import refuse_quantized

# weights, configuration, code, tokenizers
_OF_CHECKPOINTS = (
    ".safetensors",
    ".json",
    ".py",
    ".model",
    ".txt",
    ".tiktoken",
    ".jinja",
    ".spm",
    ".codes",
    ".bpe",
)
Marks = tuple[tuple[str, int, int, int], ...]


def fingerprint(folder: Path, check: bool = False) -> str:
    """SHA-256 over the checkpoint's architecture and weights; names and places left out, except the files' order.

    Code that the configuration names is part of the architecture. With `check` large files are read anew, whatever the
    hub's cache says of them and is remembered (hashes.py).
    """
    config = read_config(folder)
    digest = hashlib.sha256(json.dumps(_architecture(config), sort_keys=True).encode())
    for file in (
        *weight_files(folder),
        *(sorted(folder.glob("*.py")) if _own_code(config) else ()),
    ):
        digest.update(bytes.fromhex(content_hash(file, check)))
    return digest.hexdigest()


def fingerprint_of(folder: Path, patterns: Sequence[str]) -> str:
    """SHA-256 over the files of the checkpoint that match some pattern, their names included."""
    digest = hashlib.sha256()
    for file in sorted({f for p in patterns for f in folder.glob(p)}):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def marks(folder: Path) -> Marks:
    """What tells cheaply that a checkpoint was exchanged: (name, bytes, mtime in ns, inode) of each of its files, by name.

    A log or a page that somebody writes beside them is none.
    """
    return tuple(
        (file.name, of.st_size, of.st_mtime_ns, of.st_ino)
        for file in sorted(folder.iterdir())
        if file.suffix in _OF_CHECKPOINTS and file.is_file()
        for of in (file.stat(),)
    )


def check_unchanged(folder: Path, before: Marks) -> None:
    """Raise MpqError where the checkpoint's files are not those that had the marks `before`."""
    if marks(folder) != before:
        raise MpqError(
            f"The files in {folder} changed while they were read: run it again for the new checkpoint."
        )


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v
        for k, v in config.items()
        if k not in ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
    }


def _own_code(config: dict[str, Any]) -> bool:
    return bool(config.get("auto_map"))


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's transformers configuration, without what it says of quantized weights: they are read in base.

    Raises MpqError where transformers cannot read it, where the weights that it describes are quantized in a way that cannot
    be read, and where it needs code of the checkpoint's own that is not trusted.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    told = read_config(folder)
    refuse_quantized(told, folder)
    if _own_code(told) and not trust_remote_code and told.get("model_type") not in CONFIG_MAPPING:
        raise MpqError(
            f"{folder} needs the Python code that lies in it, which mpq does not run unless trust_remote_code is set: read that code first, or take a model that transformers knows."
        )
    try:
        config: Any = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        if not isinstance(config.get_text_config().vocab_size, int):
            raise TypeError(f"vocab_size is {config.get_text_config().vocab_size!r}")
    except (
        Exception
    ) as error:  # a mistyped value is whatever its architecture's code raises over it
        raise MpqError(
            f"{folder / 'config.json'} is not a model that transformers knows ({first_line(error)})."
        ) from None
    parts: tuple[Any, ...] = (config, getattr(config, "text_config", None))
    for part in parts:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config
