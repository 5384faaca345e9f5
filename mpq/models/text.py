"""Text as tokens: what a model is calibrated and evaluated on, in blocks of one length, begun as the model was trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from mpq.errors import MpqError, first_line, is_out_of_memory
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import load_config
from mpq.models.documents import Document, local, read_documents
from mpq.models.documents import source_key as source_key
from mpq.models.positions import check_length
from mpq.spec import TextSpec


@dataclass(frozen=True)
class Drawn:
    """Blocks, their `indices` among the `of` blocks of the text in the order drawn, and what else was done to the text.

    `begins` is what every text of the model begins with (its BOS token, "" where it has none) and so each block does;
    `skipped` counts the rows that were null or empty; `rows` are all blocks of the text, `order` the whole permutation that
    `indices` are the first of.
    """

    blocks: Blocks
    indices: np.ndarray
    of: int
    begins: str
    skipped: int
    rows: np.ndarray
    order: np.ndarray


@dataclass(frozen=True)
class Stream:
    """Tokens of documents, one after the other, and the ids that each block cut from them begins with."""

    tokens: np.ndarray
    prefix: tuple[int, ...] = ()

    def blocks(self, length: int) -> np.ndarray:
        """(blocks, length) int64: the stream from its begin to its end, each block with the prefix in front.

        Where a document begins with the block, its own prefix is the block's. The rest that fills no block is left out.
        """
        prefix, stream = np.array(self.prefix, np.int64), self.tokens
        if not len(prefix):
            whole = len(stream) // length
            return stream[: whole * length].reshape(whole, length)
        if length <= len(prefix):
            raise MpqError(
                f"Blocks of {length} tokens hold no text behind what this model's texts begin with ({len(prefix)}): give a larger length."
            )
        rows, at = [], 0
        while True:
            begins = np.array_equal(stream[at : at + len(prefix)], prefix)
            take = length if begins else length - len(prefix)
            if at + take > len(stream):
                break
            piece = stream[at : at + take]
            rows.append(piece if begins else np.concatenate([prefix, piece]))
            at += take
        return np.stack(rows) if rows else np.empty((0, length), np.int64)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer. Raises MpqError where it has none, or one whose code is not trusted."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise MpqError(
            f"{folder} has no tokenizer that transformers can read ({first_line(error)}): give token ids as .npy instead."
        ) from None


def read_blocks(
    spec: TextSpec, folder: Path, vocabulary: int, trust_remote_code: bool = False
) -> Blocks:
    """The blocks that draw_blocks draws."""
    return draw_blocks(spec, folder, vocabulary, trust_remote_code).blocks


def draw_blocks(
    spec: TextSpec, folder: Path, vocabulary: int, trust_remote_code: bool = False
) -> Drawn:
    """Draw `samples` blocks of `length` tokens (all of them where None), without overlap, reproducibly by `seed`.

    Texts are tokenized, joined by the end-of-text token and cut into blocks, each begun as the tokenizer begins a text.
    Chats go through the tokenizer's chat template; token ids are taken as they are, a two-dimensional .npy array row by
    row. Raises MpqError where there is nothing to read, too little of it, ids outside the vocabulary, or blocks longer
    than the model's learned positions.
    """
    check_length(load_config(folder, trust_remote_code), spec.length)
    begins, skipped = "", 0
    if spec.source.lower().endswith(".npy"):
        rows = _npy_rows(spec)
    else:
        found = read_documents(spec)
        skipped = found.skipped
        if all(isinstance(d, list) and isinstance(d[0], int) for d in found.documents):
            stream = Stream(_joined(found.documents))  # type: ignore[arg-type]
        else:
            tokenizer = load_tokenizer(folder, trust_remote_code)
            stream = tokenized(tokenizer, found.documents)
            begins = "".join(tokenizer.convert_ids_to_tokens(list(stream.prefix)))
        rows = stream.blocks(spec.length)
    if rows.size and (rows.min() < 0 or rows.max() >= vocabulary):
        wrong = int(rows.min() if rows.min() < 0 else rows.max())
        raise MpqError(
            f"{spec.source} holds token id {wrong}, the model's vocabulary ends at {vocabulary - 1}: use the model's own tokenizer."
        )
    if len(rows) == 0:
        raise MpqError(
            f"{spec.source} is empty or shorter than one block of {spec.length} tokens: give more text or a smaller length."
        )
    if spec.samples and len(rows) < spec.samples:
        raise MpqError(
            f"{spec.source} holds {len(rows)} blocks of {spec.length} tokens, {spec.samples} were asked for: lower samples or give more text."
        )
    order = np.random.default_rng(spec.seed).permutation(len(rows))
    drawn = order[: spec.samples]
    return Drawn(Blocks(rows[drawn]), drawn, len(rows), begins, skipped, rows, order)


def tokenized(tokenizer: Any, documents: Iterable[Document]) -> Stream:
    """The documents' tokens, each text between what the tokenizer itself puts around one, or before the end-of-text token.

    Raises MpqError for a chat that the tokenizer has no template for.
    """
    prefix, suffix = _around(tokenizer)
    if not suffix and tokenizer.eos_token_id is not None:
        suffix = (tokenizer.eos_token_id,)
    ids: list[Sequence[int]] = []
    for document in documents:
        if isinstance(document, str):
            if document.strip():
                bare = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
                ids.append([*prefix, *bare, *suffix])
        elif isinstance(document[0], dict):
            ids.append(_templated(tokenizer, document))
        else:
            ids.append(document)
    return Stream(_joined(ids), prefix)


def _joined(ids: Iterable[Sequence[int]]) -> np.ndarray:
    arrays = [np.array(each, np.int64) for each in ids]
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special ids that the tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    full = tokenizer("a", verbose=False)["input_ids"]
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return tuple(full[:at]), tuple(full[at + len(bare) :])
    return (), ()


def _templated(tokenizer: Any, messages: Any) -> list[int]:
    """The ids of a chat. Templates of multimodal models may take lists of parts alone, and silently leave out a plain text."""
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    asked = [m["content"].strip() for m in messages if m["role"] == "user"]
    why = "it leaves out what users say"
    for form in (messages, parts):
        try:
            text = tokenizer.apply_chat_template(form, tokenize=False)
        except Exception as error:  # no template, or what its Jinja code raises over these messages
            why = first_line(error)
            continue
        if all(words in text for words in asked):
            # the template writes the special tokens itself
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids
    raise MpqError(
        f"The tokenizer's chat template cannot be used for these messages ({why}): give text, or the tokenizer of a chat model."
    )


def _npy_rows(spec: TextSpec) -> np.ndarray:
    array = np.asarray(_read_npy(local(spec.source)))
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise MpqError(
            f"{spec.source} has shape {array.shape} and dtype {array.dtype}: expected (tokens,) or (rows, tokens) integers."
        )
    if array.ndim == 1:
        return Stream(array.astype(np.int64)).blocks(spec.length)
    if array.shape[1] < spec.length:
        return np.empty((0, spec.length), np.int64)
    return array[:, : spec.length].astype(np.int64)


def _read_npy(source: str) -> np.ndarray:
    try:
        with fsspec.open(source, "rb") as stream:
            return np.load(stream, allow_pickle=False)  # type: ignore[no-any-return]
    except Exception as error:  # what the system, the storage or numpy's header reader raise
        if isinstance(error, FileNotFoundError):
            raise MpqError(f"No text at {source}: expected a .npy token array.") from None
        if is_out_of_memory(error):
            raise MpqError(
                f"{source} says that it holds more tokens than there is memory for: check the file."
            ) from None
        raise MpqError(
            f"{source} cannot be read as a .npy token array ({first_line(error)})."
        ) from None
