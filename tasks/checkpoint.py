"""A checkpoint as tasks get it: where its files are, which may be another machine than the flow's, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mpq.errors import MpqError


@dataclass(frozen=True)
class Weights:
    """A model to be loaded. Where it lies does not count in a key."""

    source: str
    fingerprint: str
    base: str
    device: str
    marks: tuple[tuple[str, int, int, int], ...] = ()  # of a local folder's files, when it was read
    trusted: bool = False  # whether code of its own may run
    memory: int | None = None  # bytes that may be taken beside GPUs; what is free if left out

    @property
    def content(self) -> tuple[str, ...]:
        """What of it a table depends on."""
        return self.fingerprint, self.base, self.device

    def check_unchanged(self) -> None:
        """Raise MpqError where other files were put in place since the content was taken: loaded weights are pages of these files."""
        from mpq.models.checkpoint import check_unchanged

        if self.marks:
            check_unchanged(Path(self.source), self.marks)


@dataclass(frozen=True)
class Architecture:
    """A model to be timed, with random weights: time does not depend on them, so a new checkpoint re-uses every measurement.

    `made_with` is what a time depends on besides the model: the kind of device, its kernels' code, the libraries.
    """

    source: str
    key: str
    base: str
    device: str
    made_with: tuple[str, ...]
    trusted: bool = False

    @property
    def content(self) -> tuple[object, ...]:
        """What of it a table depends on."""
        return self.key, self.base, self.device, self.made_with

    @property
    def device_name(self) -> str:
        """The kind of device that its times are kept under."""
        return self.made_with[0]


def source_of(path: str, revision: str | None, folder: Path, shared: bool) -> str:
    """What to hand to tasks: the flow's `folder`, or where tasks run elsewhere what each machine can fetch for itself.

    A local folder stays one: on a cluster it must lie on a file system that every worker has.
    """
    if not shared or Path(path).is_dir():
        return str(folder.absolute())
    return path if "://" in path else f"{path}@{revision or ''}"


@lru_cache(maxsize=8)
def at_hand(source: str, fingerprint: str = "", trusted: bool = False) -> Path:
    """A local folder with the checkpoint that `source` (see `source_of`) names, fetched once a process.

    Raises MpqError where it cannot be had, or is not the one with this fingerprint any more.
    """
    from mpq.models.checkpoint import fetch
    from mpq.models.checkpoint import fingerprint as fingerprint_of_folder

    if Path(source).is_dir():
        return Path(source)
    path, _, revision = (source, "", "") if "://" in source else source.partition("@")
    folder = fetch(path, revision or None, trusted)
    if fingerprint and fingerprint_of_folder(folder) != fingerprint:
        raise MpqError(
            f"{path} has changed since the run began: run it again for the new checkpoint."
        )
    return folder


@lru_cache(maxsize=1)
def loaded(weights: Weights) -> Any:
    """The model, kept for the next task in this process that asks for the same.

    Raises MpqError where other files were put in place since the checkpoint's content was taken.
    """
    from mpq.models.loading import load_model

    folder = at_hand(weights.source, weights.fingerprint, weights.trusted)
    model = load_model(folder, weights.base, weights.device, weights.trusted, weights.memory)
    weights.check_unchanged()
    return model


def with_random_weights(architecture: Architecture) -> Any:
    """The model as it is timed, on its device."""
    from mpq.timing.measure import timing_model

    model = timing_model(configuration(architecture), architecture.base)
    return model.to(architecture.device)


def configuration(architecture: Architecture) -> Any:
    """The model's transformers configuration. Raises MpqError where it is another one than when the run began."""
    from mpq.models.architecture import architecture_key
    from mpq.models.checkpoint import load_config

    trusted = architecture.trusted
    config = load_config(at_hand(architecture.source, trusted=trusted), trusted)
    if architecture_key(config) != architecture.key:
        raise MpqError(
            f"The config.json of {architecture.source} has changed since the run began: run it again for the new checkpoint."
        )
    return config
