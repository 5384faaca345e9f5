"""What can be told of a spec in a moment: missing files, too little text, a device that is not there.

Nothing is loaded that takes a second, and nothing is refused that might work: what only a tokenizer or the hub
can tell is told later, by those who ask them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mpq import devices
from mpq.errors import MpqError, require
from mpq.folders import unwritable
from mpq.spec.export import NEEDS
from mpq.spec.run import FROM_TASKS, RunSpec, TextSpec

_LINES = (".jsonl", ".ndjson", ".json")
_PLAIN = (".txt", ".md", *_LINES)
# a name that ends so is a file's, not a dataset's id
OF_FILES = (
    *(*_PLAIN, ".npy", ".parquet", ".csv", ".tsv", ".py", ".zip", ".tar", ".tgz"),
    *(".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4"),
)
# tokens that a tokenizer may put around a document: begin, end, the space that some set before it
_AROUND = 3
# compatibility characters may become many when normalised (U+FDFA: 18 of up to 2 bytes, from 3)
_EXPANSION = 12


def resolved(spec: RunSpec, resolve: Callable[[str], str] = devices.resolve) -> RunSpec:
    """The spec with its device named: what `auto` means here, or where `resolve` is asked (on a cluster's worker)."""
    device = resolve(spec.model.device)
    if device == spec.model.device:
        return spec
    model = spec.model.model_copy(update={"device": device})
    return spec.model_copy(update={"model": model})


def check_early(spec: RunSpec) -> None:
    """Raise MpqError for what is wrong with a spec on this machine and can be told at once.

    Checked are the folder for plans and report, what must be installed, the model's folder, the texts, and last, since
    torch has to be loaded for it, a GPU that is asked for.
    """
    check_out(spec)
    _check_installed(spec)
    _check_model(spec.model.path)
    _check_text(spec.calibration, "calibration")
    if spec.evaluation:
        _check_text(spec.evaluation, "evaluation")
        folder = spec.evaluation.data_dir
        if folder and "://" not in folder and not Path(folder).is_dir():
            raise MpqError(
                f"evaluation.data_dir: there is no folder {folder}: expected <task>/<split>.jsonl in it."
            )
    if spec.runner.kind == "local" and spec.model.device != "auto":
        devices.check_device(spec.model.device)


def check_out(spec: RunSpec) -> None:
    """Raise MpqError unless plans and report can be written where the spec says: asked before hours of work, not after."""
    folder = Path(spec.out) / spec.name
    for place in (folder, folder / "plans"):
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        if why := unwritable(place):
            raise MpqError(
                f"The output folder {folder} cannot be written: {place} {why}. Set `out` in the spec to a folder of yours."
            )


def _check_installed(spec: RunSpec) -> None:
    if spec.solver == "gurobi":
        require("gurobipy", "solver: gurobi")
    if spec.evaluation and spec.evaluation.tasks:
        require("lm_eval", "evaluation.tasks")
    if spec.export and spec.export.to in NEEDS:
        require(NEEDS[spec.export.to], "export")
    if spec.runner.kind != "local":
        require(f"prefect_{spec.runner.kind}", f"runner.kind: {spec.runner.kind}")


def _check_model(path: str) -> None:
    if "://" in path:
        return
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise MpqError(
                f"{path} has no config.json: expected a checkpoint in Hugging Face layout."
            )
    elif path.startswith((".", "/")) or Path(path).is_file():
        raise MpqError(
            f"No checkpoint at {path}: expected a folder with config.json and *.safetensors, a hub id or an fsspec URL."
        )


def _check_text(text: TextSpec, key: str) -> None:
    path = Path(text.source)
    folder = path if path.is_dir() else Path(text.source.partition(":")[0])  # and a configuration
    if "://" in text.source or text.source == FROM_TASKS or folder.is_dir():
        return
    if not path.is_file():
        if text.source.startswith((".", "/")) or path.suffix in OF_FILES:
            raise MpqError(
                f"No text at {text.source} ({key}.source): expected a text file, .jsonl, .npy, an fsspec URL or a "
                "Hugging Face dataset id."
            )
        require("datasets", f"{key}.source: {text.source}")
        return
    try:
        most = _blocks_at_most(path, text)
    except (OSError, ValueError):
        return  # told by who reads it, with the reason
    if most is None:
        return
    if most == 0:
        raise MpqError(
            f"{text.source} is empty or shorter than one block of {text.length} tokens: give more text or a smaller {key}.length."
        )
    if text.samples and most < text.samples:
        raise MpqError(
            f"{text.source} holds at most {most} blocks of {text.length} tokens, {text.samples} were asked for: "
            f"lower {key}.samples or give more text."
        )


def _blocks_at_most(path: Path, text: TextSpec) -> int | None:
    """How many blocks a file can hold; None where only reading it tells, or where it surely holds enough."""
    if path.suffix == ".npy":
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
        if len(shape) == 2:
            return shape[0] if shape[1] >= text.length else 0
        return shape[0] // text.length if len(shape) == 1 else None
    if path.suffix not in _PLAIN or text.field != "text":
        return None  # a chat's template adds tokens of its own
    enough = (text.samples or 1) * text.length
    if path.stat().st_size >= enough:  # no more can be said without the tokenizer
        return None
    content = path.read_bytes()
    documents = content.count(b"\n") + 1 if path.suffix in _LINES else 1
    size = len(content.strip()) * (1 if content.isascii() else _EXPANSION)
    # a character is one token at most, and its bytes are where a tokenizer falls back on them
    return (size + _AROUND * documents * bool(size)) // text.length
