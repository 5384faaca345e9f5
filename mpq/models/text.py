"""Text and its tokens: what a model is calibrated and evaluated on, as blocks of one length."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from mpq.errors import MpqError, first_line
from mpq.models.blocks import Blocks
from mpq.spec import TextSpec


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer. Raises MpqError where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise MpqError(
            f"{folder} has no tokenizer that transformers can read ({first_line(error)}): give token ids as .npy instead."
        ) from None


def read_blocks(spec: TextSpec, folder: Path, vocabulary: int) -> Blocks:
    """The blocks that draw_blocks draws."""
    return draw_blocks(spec, folder, vocabulary)[0]


def draw_blocks(spec: TextSpec, folder: Path, vocabulary: int) -> tuple[Blocks, np.ndarray, int]:
    """Draw `samples` blocks of `length` tokens (all of them where None), without overlap, reproducibly by `seed`.

    Returns the blocks, their indices among those of the text in the order drawn, and how many the text holds.

    Texts are tokenized, joined by the end-of-text token and cut into blocks. A two-dimensional .npy array is used row by
    row. Raises MpqError where there is nothing to read, too little of it, or ids outside the vocabulary.
    """
    rows = _token_rows(spec, folder)
    if rows.size and (rows.min() < 0 or rows.max() >= vocabulary):
        raise MpqError(
            f"{spec.source} holds token id {int(rows.max())}, the model's vocabulary ends at {vocabulary - 1}: use the model's own tokenizer."
        )
    if len(rows) == 0:
        raise MpqError(
            f"{spec.source} is empty or shorter than one block of {spec.length} tokens: give more text or a smaller length."
        )
    if spec.samples and len(rows) < spec.samples:
        raise MpqError(
            f"{spec.source} holds {len(rows)} blocks of {spec.length} tokens, {spec.samples} were asked for: lower samples or give more text."
        )
    drawn = np.random.default_rng(spec.seed).permutation(len(rows))[: spec.samples]
    return Blocks(rows[drawn]), drawn, len(rows)


def _token_rows(spec: TextSpec, folder: Path) -> np.ndarray:
    if spec.source.endswith(".npy"):
        array = np.asarray(_read_npy(spec.source))
        if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
            raise MpqError(
                f"{spec.source} has shape {array.shape} and dtype {array.dtype}: expected (tokens,) or (rows, tokens) integers."
            )
        if array.ndim == 2:
            return (
                array[:, : spec.length].astype(np.int64)
                if array.shape[1] >= spec.length
                else array[:0]
            )
        stream = array.astype(np.int64)
    else:
        texts, tokenizer = _texts(spec), load_tokenizer(folder)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [
            np.array(
                tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] + end, np.int64
            )
            for t in texts
            if t.strip()
        ]
        stream = np.concatenate(ids) if ids else np.empty(0, np.int64)
    whole = len(stream) // spec.length
    return stream[: whole * spec.length].reshape(whole, spec.length)


def _read_npy(source: str) -> np.ndarray:
    try:
        with fsspec.open(source, "rb") as stream:
            return np.load(stream, allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise MpqError(
            f"{source} cannot be read as a .npy token array ({first_line(error)})."
        ) from None


def _texts(spec: TextSpec) -> list[str]:
    source = spec.source
    if "://" not in source and not Path(source).is_file():
        if (
            source.count("/") <= 1
            and not source.startswith((".", "/", "~"))
            and not Path(source).suffix
        ):
            return _dataset_texts(spec)
        raise MpqError(
            f"No text at {source}: expected a text file, .jsonl, .npy, an fsspec URL or a Hugging Face dataset id."
        )
    try:
        with fsspec.open(source, "rt", encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError, ImportError, ValueError) as error:
        raise MpqError(f"{source} cannot be read as UTF-8 text ({first_line(error)}).") from None
    if not source.endswith((".jsonl", ".json")):
        return [text]
    try:
        return [str(json.loads(line)[spec.field]) for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise MpqError(
            f"{source} is not JSONL with the key {spec.field!r} on each line ({first_line(error)})."
        ) from None


def _dataset_texts(spec: TextSpec) -> list[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(spec.source, split=spec.split)
        return [str(row[spec.field]) for row in rows]
    except Exception as error:
        raise MpqError(
            f"{spec.source} is no local file and could not be loaded as a dataset ({first_line(error)})."
        ) from None


def source_key(spec: TextSpec) -> str | None:
    """Hash of a text source's content, without reading it into tokens; None where only loading can tell (a dataset id)."""
    if "://" not in spec.source and not Path(spec.source).is_file():
        return None
    try:
        with fsspec.open(spec.source, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ImportError, ValueError) as error:
        raise MpqError(f"{spec.source} cannot be read ({first_line(error)}).") from None
