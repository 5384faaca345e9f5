"""How a checkpoint of a plan lies in its files: what each kind of them says for itself (scheme.py, modelopt.py, torchao.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor

from mpq.export.codes import sizes_of
from mpq.export.shards import Shard
from mpq.export.skeleton import Skeleton
from mpq.formats.scheme import Scheme

# how the check reads it again: as transformers loads what is in codes, torchao's tensors among them, or as values (reload.py)
Reading: TypeAlias = Literal["codes", "torchao", "values"]
Lowered: TypeAlias = Mapping[str, str]  # lowered op → scheme


def _all_held(lowered: Lowered, base: str, model: Skeleton) -> None:
    """For what holds whatever expressible.py lets pass."""


def _as_coded(tensors: dict[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """The names and layouts of codes.py, which are compressed-tensors'."""
    return tensors


def _nothing_beside(lowered: Lowered, model: Skeleton) -> Iterator[tuple[str, str]]:
    """No file but those that every checkpoint has."""
    yield from ()


def _plain(shards: tuple[Shard, ...], base: str) -> dict[str, str]:
    """What transformers writes into a file's header."""
    return {"format": "pt"}


@dataclass(frozen=True)
class Layout:
    """One kind of checkpoint.

    `check_held` raises MpqError for a plan that it cannot hold; `laid_out` makes of a weight's tensors (codes.py) and its scheme
    its own, of the sizes that `sizes` tells beforehand; `section` is the `quantization_config` of config.json, `beside` are
    other files and their content, `metadata` is said in the header of each file of weights. `stacked` is whether the lowered
    experts of a layer lie in one tensor, (experts, K, C) in the model, and not each under its own name; `as_is`, whether what
    transformers renames within a layer keeps the checkpoint's names (skeleton.py). `cache` is what `section` says besides where
    the cache of keys and values is lowered; empty in a kind that cannot say it.
    """

    section: Callable[[Lowered, Skeleton], dict[str, Any]]
    reading: Reading
    check_held: Callable[[Lowered, str, Skeleton], None] = _all_held
    sizes: Callable[[Scheme, tuple[int, ...]], dict[str, int]] = sizes_of
    laid_out: Callable[[dict[str, Tensor], str], dict[str, Tensor]] = _as_coded
    beside: Callable[[Lowered, Skeleton], Iterator[tuple[str, str]]] = _nothing_beside
    metadata: Callable[[tuple[Shard, ...], str], dict[str, str]] = _plain
    stacked: bool = False
    as_is: bool = True
    cache: Mapping[str, Any] = field(default_factory=dict)
