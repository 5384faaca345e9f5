"""A checkpoint's tensors, streamed shard by shard: read, rounded where the plan lowers them,
written.

A shard of the source becomes one of the export, or several where it is larger than a limit: peak
memory is about one shard, whatever the model's size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor

from mpq.errors import MpqError
from mpq.export.codes import sizes_of, tensors_of
from mpq.export.skeleton import Skeleton, parts_of
from mpq.formats.format import get_format
from mpq.formats.scheme import Scheme, get_scheme
from mpq.models.dense import Dense, tensors_by_file
from mpq.models.layout import INDEX, opened

SHARD_BYTES = 4 * 2**30
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
# what blocks' scales of a weight, and of its input, are shares of (quantize.share_of)
Shares: TypeAlias = tuple[float, float | None]
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Part:
    """One expert's matrix in a tensor of all: the rows from `start` to `end` of (experts, C, K), or
    as many columns of (experts, K, C) where it is `transposed`."""

    expert: int
    start: int
    end: int
    transposed: bool = False


@dataclass(frozen=True)
class Piece:
    """One tensor of the source on its way: written as `name`, in `format` with its scales beside
    it, or in base ("")."""

    file: str
    tensor: str
    name: str
    format: str
    shape: tuple[int, ...]
    bytes: int
    part: Part | None = None
    op: str = ""  # the op whose weight it is, or one expert's of it

    @property
    def module(self) -> str:
        """Its name without the weight's."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Shard:
    """A file of the export and what goes into it."""

    file: str
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(piece.bytes for piece in self.pieces)


def shards_of(
    folder: Path,
    model: Skeleton,
    lowered: Mapping[str, str],
    base: str,
    limit: int = SHARD_BYTES,
    sizes: Callable[[Scheme, tuple[int, ...]], dict[str, int]] = sizes_of,
    stacked: bool = False,
) -> tuple[Shard, ...]:
    """How the checkpoint in `folder` is written anew; only the files' headers are read. `sizes`
    tells the bytes of a weight's tensors; `stacked`, that a layer's lowered experts stay in one
    (layout.py).

    A lowered weight that is tied becomes a tensor of its own; each expert's keeps its name. Raises
    MpqError where the checkpoint has no weight of a lowered op under its name, or all experts in
    one tensor.
    """
    held = {
        file: {model.name_of(key): (key, *_told(part)) for key, part in parts.items()}
        for file, parts in tensors_by_file(folder)
    }
    names = {name for tensors in held.values() for name in tensors}
    taken_from = {_source(op, model, names): op for op in lowered if op not in model.expert_ops}
    of_experts = _of_experts(set(lowered) & set(model.expert_ops), model, names, stacked)
    linears = {*model.linears, *model.transposed}
    groups: list[tuple[Piece, ...]] = []
    for file, tensors in held.items():
        of_file: list[Piece] = []
        for name, (tensor, kind, shape) in tensors.items():
            op, into = taken_from.get(name), ""
            kept = {model.written(tensor)}
            if op:  # what is tied to it stays in base, under names of its own
                into = f"{model.coded(op)}.weight"
                kept = (kept | model.sharing(name) - names) - {into}
            elif op := of_experts.get(name):
                into, kept = name, set()
            linear = name.removesuffix(".weight")
            linear = "" if op or linear not in linears else linear
            pieces = [
                Piece(file, tensor, n, "", shape, _bytes(kind, shape, base), op=linear)
                for n in sorted(kept)
            ]
            if lowered and model.taken_apart(name):
                pieces = [
                    Piece(file, tensor, to, "", each, _bytes(kind, each, base), part)
                    for to, each, part in _one_by_one(name, tensor, shape, transposed=True)
                ]
            if op:
                parts: list[tuple[str, tuple[int, ...], Part | None]] = [(into, shape, None)]
                if name == op and not stacked:
                    turned = shape != model.expert_shapes[op]
                    parts = list(_one_by_one(name, tensor, shape, turned))
                for to, each, part in parts:
                    _check_width(op, lowered[op], each)
                    coded = sum(sizes(get_scheme(lowered[op]), each).values())
                    pieces.append(Piece(file, tensor, to, lowered[op], each, coded, part, op))
            of_file += pieces
        groups += _cut(of_file, limit)
    if len(groups) == 1:
        return (Shard("model.safetensors", groups[0]),)
    return tuple(
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", of_shard)
        for number, of_shard in enumerate(groups, 1)
    )


def _cut(pieces: Iterable[Piece], limit: int) -> Iterator[tuple[Piece, ...]]:
    """The pieces in their order, so many at once as have `limit` bytes at most; a larger one
    alone."""
    taken: list[Piece] = []
    size = 0
    for piece in pieces:
        if taken and size + piece.bytes > limit:
            yield tuple(taken)
            taken, size = [], 0
        taken.append(piece)
        size += piece.bytes
    if taken:
        yield tuple(taken)


def _one_by_one(
    name: str, tensor: str, shape: tuple[int, ...], transposed: bool = False
) -> Iterator[tuple[str, tuple[int, ...], Part | None]]:
    """What each expert's matrices of a tensor (experts, C, K), or (experts, K, C) where it is
    `transposed`, are called, their shapes and where they lie: gate and up one after the other where
    it holds both. The experts are called as the checkpoint does if it calls the tensor as the model
    does."""
    owner, _, product = name.rpartition(".")
    owner = tensor.rpartition(".")[0] if tensor.endswith(f".{product}") else owner
    experts, rows, columns = shape
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    parts = parts_of(product)
    high = outputs // len(parts)
    for expert in range(experts):
        for number, part in enumerate(parts):
            place = Part(expert, number * high, (number + 1) * high, transposed)
            yield f"{owner}.{expert}.{part}.weight", (high, inputs), place


def _check_width(op: str, name: str, shape: tuple[int, ...]) -> None:
    """Raise MpqError where rows are not whole blocks of the scheme's, which no file and no kernel
    holds."""
    for fmt in get_scheme(name).formats:
        if fmt.block[1] and shape[1] % fmt.block[1]:
            raise MpqError(
                f"{op} has {shape[1]} inputs and runs in {name} in this plan, whose blocks are {fmt.block[1]} wide: pin it to base and solve again."
            )


def _told(part: Any) -> tuple[str, tuple[int, ...]]:
    return part.get_dtype(), tuple(part.get_shape())


def _source(op: str, model: Skeleton, names: set[str]) -> str:
    """The name under which the checkpoint holds the weight of `op`: its own, or that of what it is
    tied to."""
    own = f"{op}.weight"
    for name in (own, *sorted(model.sharing(own))):
        if name in names:
            return name
    raise MpqError(
        f"The checkpoint holds no {own}: it keeps that weight under another name or in one tensor with others, which cannot be exported yet; pin {op} to base and solve again."
    )


def _of_experts(ops: set[str], model: Skeleton, names: set[str], stacked: bool) -> dict[str, str]:
    """Each tensor that holds one expert's matrix of one of `ops`, or those of all where they are
    `stacked`, and the op."""
    if not ops:
        return {}
    if stacked:
        return {op: op for op in ops & names}
    found = {name: op for name in names if (op := model.expert_op(name)) in ops}
    found |= {op: op for op in ops & names if model.read_one_by_one(op)}
    if missing := sorted(ops - set(found.values())):
        raise MpqError(
            f"The checkpoint keeps all experts of {missing[0]} in one tensor, and no engine is known to read lowered experts of a {model.model_type} one by one: pin *.experts.* to base and solve again (gpt-oss's can be in mxfp4a16: export --to mxfp4)."
        )
    return found


def _bytes(kind: str, shape: tuple[int, ...], base: str) -> int:
    size = get_format(base).bits // 8 if kind in _FLOATS else _SIZES.get(kind, 1)
    return math.prod(shape) * size


def write_shard(
    shard: Shard,
    source: Path,
    base: str,
    to: Path,
    shares: Mapping[str, Shares],
    laid_out: Callable[[dict[str, Tensor], str], dict[str, Tensor]],
    metadata: Mapping[str, str],
    more: Mapping[str, float],
) -> None:
    """Read, round and write one shard; `shares` are of ops whose blocks' scales are shares of a
    tensor's, `laid_out` makes of a weight's tensors and its scheme those that are written
    (layout.py), `more` are scales that no tensor of the source has. Raises MpqError for values that
    are not finite where they have to be."""
    dtype = getattr(torch, get_format(base).dtype)
    written = {name: torch.tensor([scale]) for name, scale in more.items()}
    files = dict(tensors_by_file(source, {piece.file for piece in shard.pieces}))
    for piece in shard.pieces:
        part = files[piece.file][piece.tensor]
        if piece.format:
            module = piece.module
            of = whole(part, piece)
            scheme = get_scheme(piece.format)
            how = (scheme, dtype, piece.tensor, *shares.get(module, (None, None)))
            if len(piece.shape) == 3:  # all experts', (experts, K, C), of no module of their own
                each = [
                    laid_out(tensors_of(w.T.contiguous(), *how), piece.format) for w in _experts(of)
                ]
                found = {f"{module}_{end}": torch.stack([e[end] for e in each]) for end in each[0]}
            else:
                coded = laid_out(tensors_of(of, *how), piece.format)
                found = {f"{module}.{end}": tensor for end, tensor in coded.items()}
            written |= found
        else:
            tensor = whole(part, piece)[...]
            written[piece.name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    save_file(written, to, metadata=dict(metadata))


def _experts(of: Any) -> Iterator[Tensor]:
    """One expert's matrix of a tensor, or of safetensors' slice of one, after the other."""
    for expert in range(len(of) if isinstance(of, Tensor) else of.get_shape()[0]):
        yield of[expert : expert + 1][0]


def whole(part: Any, piece: Piece) -> Any:
    """The matrix that a piece is, of its tensor in the source: one expert's of all, and
    safetensors' slice as it is, to be read in chunks."""
    if piece.part is None:
        return part[...] if isinstance(part, Dense) else part  # decoded once, not in chunks
    expert, rows = piece.part.expert, slice(piece.part.start, piece.part.end)
    if piece.part.transposed:
        return part[expert : expert + 1, :, rows][0].T.contiguous()
    return part[expert : expert + 1, rows][0]


def write_index(shards: tuple[Shard, ...], folder: Path) -> None:
    """The index of several shards that were written: which tensor lies in which file."""
    if len(shards) == 1:
        return
    placed = {name: s.file for s in shards for name in opened(folder / s.file).keys()}  # noqa: SIM118 (no mapping)
    index = {
        "metadata": {"total_size": sum(shard.bytes for shard in shards)},
        "weight_map": dict(sorted(placed.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def in_base(shards: tuple[Shard, ...], base: str) -> int:
    """Bytes of the same tensors all in base; a tied weight that is lowered counts once, as the
    source has it."""
    size = get_format(base).bits // 8
    seen: dict[tuple[object, ...], int] = {}
    for piece in (piece for shard in shards for piece in shard.pieces):
        in_full = math.prod(piece.shape) * size if piece.format else piece.bytes
        seen[piece.file, piece.tensor, piece.part] = in_full
    return sum(seen.values())
