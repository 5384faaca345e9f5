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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.devices import check_device
from mpq.errors import MpqError
from mpq.formats import get_format
from mpq.spec import TextSpec
from mpq.transport import carry, open_filesystem

log = logging.getLogger("mpq")

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model"]


def cache_folder() -> Path:
    """Where fetched checkpoints are kept: $MPQ_CACHE, or a folder of this user's under the temporary one."""
    return Path(os.environ.get("MPQ_CACHE") or Path(tempfile.gettempdir()) / f"mpq-cache-{os.getuid()}")


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
        return {f: fs.info(f) for f in fs.ls(root, detail=False) if f.endswith((".safetensors", ".json", ".txt", ".model"))}

    try:
        files = carry(listed, url, "read", "checkpoint")
    except FileNotFoundError:
        raise MpqError(f"There is no checkpoint at {url}: expected an fsspec URL of a folder.") from None
    # a copy is as good as its listing: names, sizes and the store's own version marks
    marks = {
        f: [i.get("size"), str(i.get("ETag") or i.get("etag") or i.get("mtime") or i.get("created"))] for f, i in files.items()
    }
    folder = cache_folder() / hashlib.sha256(json.dumps([url, marks], sort_keys=True).encode()).hexdigest()[:32]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            for f, info in files.items():
                carry(partial(_download, fs, f, Path(aside) / Path(f).name, info.get("size")), url, "read", "checkpoint")
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
            raise MpqError(f"{folder} lacks {missing[0]}, which its index lists: fetch the checkpoint again.")
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
        raise MpqError(f"{folder / 'config.json'} is not JSON: fetch the checkpoint again.") from None
    return {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version", "torch_dtype", "dtype")}


def load_config(folder: Path) -> Any:
    """The checkpoint's transformers configuration. Raises MpqError where transformers cannot read it."""
    from transformers import AutoConfig

    _architecture(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MpqError(f"{folder / 'config.json'} is not a model that transformers knows ({reason}).") from None


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
            folder, config=config, dtype=getattr(torch, get_format(base).dtype), local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # safetensors, json and torch each raise their own
        raise MpqError(
            f"The weights in {folder} cannot be loaded ({_first_line(error)}): the checkpoint is damaged, fetch it again."
        ) from None
    finally:
        hf_logging.set_verbosity(shown)
    model, report = loaded
    wrong = [*report.get("missing_keys", ()), *(k[0] if isinstance(k, tuple) else k for k in report.get("mismatched_keys", ()))]
    if wrong:
        raise MpqError(
            f"The weights in {folder} lack {sorted(wrong)[0]} (or have it in another shape) that config.json asks for: fetch it again."
        )
    model.eval().requires_grad_(False)
    return model.to(device)  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer. Raises MpqError where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise MpqError(
            f"{folder} has no tokenizer that transformers can read ({_first_line(error)}): give token ids as .npy instead."
        ) from None


@dataclass(frozen=True)
class Blocks:
    """Calibration or evaluation data: `tokens` (samples, length) int64, every one real (blocks are packed, not padded)."""

    tokens: np.ndarray

    @property
    def key(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(f"{self.tokens.shape}".encode() + np.ascontiguousarray(self.tokens, np.int64).tobytes()).hexdigest()

    def shards(self, count: int) -> list[Blocks]:
        """At most `count` pieces of nearly equal size, in order."""
        return [Blocks(part) for part in np.array_split(self.tokens, min(count, len(self.tokens)))]

    def batches(self, size: int, device: str = "cpu") -> Iterator[Tensor]:
        """(≤ size, length) int64 tensors, in order."""
        for at in range(0, len(self.tokens), size):
            yield torch.from_numpy(np.ascontiguousarray(self.tokens[at : at + size])).to(device)


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
            return array[:, : spec.length].astype(np.int64) if array.shape[1] >= spec.length else array[:0]
        stream = array.astype(np.int64)
    else:
        texts, tokenizer = _texts(spec), load_tokenizer(folder)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [
            np.array(tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] + end, np.int64)
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
        raise MpqError(f"{source} cannot be read as a .npy token array ({_first_line(error)}).") from None


def _texts(spec: TextSpec) -> list[str]:
    source = spec.source
    if "://" not in source and not Path(source).is_file():
        if source.count("/") <= 1 and not source.startswith((".", "/", "~")) and not Path(source).suffix:
            return _dataset_texts(spec)
        raise MpqError(f"No text at {source}: expected a text file, .jsonl, .npy, an fsspec URL or a Hugging Face dataset id.")
    try:
        with fsspec.open(source, "rt", encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError, ImportError, ValueError) as error:
        raise MpqError(f"{source} cannot be read as UTF-8 text ({_first_line(error)}).") from None
    if not source.endswith((".jsonl", ".json")):
        return [text]
    try:
        return [str(json.loads(line)[spec.field]) for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise MpqError(f"{source} is not JSONL with the key {spec.field!r} on each line ({_first_line(error)}).") from None


def _dataset_texts(spec: TextSpec) -> list[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(spec.source, split=spec.split)
        return [str(row[spec.field]) for row in rows]
    except Exception as error:
        raise MpqError(f"{spec.source} is no local file and could not be loaded as a dataset ({_first_line(error)}).") from None


def source_key(spec: TextSpec) -> str | None:
    """Hash of a text source's content, without reading it into tokens; None where only loading can tell (a dataset id)."""
    if "://" not in spec.source and not Path(spec.source).is_file():
        return None
    try:
        with fsspec.open(spec.source, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ImportError, ValueError) as error:
        raise MpqError(f"{spec.source} cannot be read ({_first_line(error)}).") from None


def sample_losses(model: nn.Module, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """g_i: mean cross entropy (nats) over the predicted tokens of each sample, padding left out.

    tokens (B, T) int64, attention_mask (B, T) or None; returns (B,) FP32. Source: method.md, "Loss-MSE sensitivity".
    """
    logits = model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    target = tokens[:, 1:]
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    if attention_mask is None:
        return loss.mean(dim=1)
    real = attention_mask[:, 1:].to(loss.dtype)
    return (loss * real).sum(dim=1) / real.sum(dim=1)
