"""The largest magnitudes that a text brings about in the source's model, and the scales of blocks
that hang on them: what those are shares of, for each op that has such, of its weight and of its
input."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.export.cache import Caches
from mpq.export.codes import share_of_weight
from mpq.export.engines import fused_together
from mpq.export.shards import Piece, Shard, Shares, whole
from mpq.formats.format import get_format
from mpq.formats.quantize import share_of
from mpq.formats.scheme import get_scheme
from mpq.models.attention import AttentionHandler, intercept
from mpq.models.blocks import Blocks
from mpq.models.dense import tensors_by_file
from mpq.models.experts import ExpertProduct, Routing, dispatched, intercept_experts
from mpq.models.placement import device_of

BATCH = 2


def _sharing(shards: Sequence[Shard]) -> dict[str, Piece]:
    """The weights with blocks that share a tensor's scale, by their modules' names."""
    return {
        piece.module: piece
        for shard in shards
        for piece in shard.pieces
        if piece.format and get_scheme(piece.format).weights.scale == "e4m3"
    }


def measured_inputs(shards: Sequence[Shard]) -> dict[str, str]:
    """Op → scheme of those whose input has blocks that share a tensor's scale, which is in the
    file."""
    pieces = _sharing(shards).values()
    return {p.op: p.format for p in pieces if get_scheme(p.format).activations}


def shares_of(
    shards: Sequence[Shard], source: Path, base: str, engine: str, inputs: Mapping[str, Tensor]
) -> dict[str, Shares]:
    """For each weight with blocks that share a tensor's scale, by its module's name, what is in its
    checkpoint, the same for what `engine` multiplies at once; `inputs` are the largest magnitudes
    of `measured_inputs`, of experts that of all."""
    pieces = _sharing(shards)
    dtype = getattr(torch, get_format(base).dtype)
    own: dict[str, float] = {}
    for file, parts in tensors_by_file(source) if pieces else ():
        for name, piece in pieces.items():
            if piece.file == file:
                weight = whole(parts[piece.tensor], piece)
                of = get_scheme(piece.format).weights
                own[name] = share_of_weight(weight, of, dtype, piece.tensor)
    for together in fused_together(own, engine):
        own |= dict.fromkeys(together, min(own[name] for name in together))
    return {name: (share, _share_of_input(pieces[name], inputs)) for name, share in own.items()}


def _share_of_input(piece: Piece, inputs: Mapping[str, Tensor]) -> float | None:
    rounds = get_scheme(piece.format).activations
    return None if rounds is None else share_of(inputs[piece.op], rounds)


@dataclass(frozen=True)
class Largest:
    """The largest magnitudes in a text: of what enters an op, (1,), and of K and V of an attention,
    (2,), FP32."""

    inputs: Mapping[str, Tensor]
    caches: Mapping[str, Tensor]


class _Entering(ExpertProduct):
    """An experts' product that keeps the largest magnitude of what enters it."""

    largest = torch.zeros(1)

    def operand(self, x: Tensor, routing: Routing | None) -> Tensor:
        self.largest = torch.maximum(self.largest, x.abs().amax().float().cpu())
        return x


class _Cached(AttentionHandler):
    """An attention that keeps the largest magnitudes of its keys and values."""

    largest = torch.zeros(2)

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        now = torch.stack([x.abs().amax().float().cpu() for x in (key, value)])
        self.largest = torch.maximum(self.largest, now)
        return query, key, value


def largest_in(
    blocks: Blocks | None,
    inputs: Mapping[str, str],
    caches: Caches,
    source: Path,
    base: str,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Largest:
    """What of the `inputs` (op → scheme) and the `caches` has to be measured, in one pass of the
    model over the text: all caches where one is lowered. Raises MpqError where there is no text."""
    from mpq.models.loading import load_model

    if not inputs and not caches.lowered:
        return Largest({}, {})
    if blocks is None:
        raise MpqError(_without_text(inputs, caches))
    model = load_model(source, base, device, trust_remote_code)
    largest = dict.fromkeys(inputs, torch.zeros(1))
    experts: dict[str, dict[str, _Entering]] = defaultdict(dict)
    attentions = {name: _Cached() for name in (*caches.lowered, *caches.kept)}

    def see(op: str) -> Any:
        def hook(module: nn.Module, entering: tuple[Tensor, ...]) -> None:
            largest[op] = torch.maximum(largest[op], entering[0].abs().amax().float().cpu())

        return hook

    for op in inputs:
        owner, _, product = op.rpartition(".")
        if dispatched(module := model.get_submodule(owner)):
            experts[owner][product] = _Entering(module, product)
        else:
            model.get_submodule(op).register_forward_pre_hook(see(op))
    with (
        torch.inference_mode(),
        intercept_experts(model, experts),
        intercept(model, attentions),
    ):
        for tokens in blocks.batches(BATCH, str(device_of(model))):
            model(input_ids=tokens, use_cache=False)
    for owner, products in experts.items():
        largest |= {f"{owner}.{name}": product.largest for name, product in products.items()}
    return Largest(largest, {name: seen.largest for name, seen in attentions.items()})


def _without_text(inputs: Mapping[str, str], caches: Caches) -> str:
    """Why text is needed."""
    if inputs:
        op = min(inputs)
        return f"{op} runs in {inputs[op]}, whose activations have a scale that is measured on text before they come: export it with its check (without --no-check), or make the plan with {inputs[op]}a16."
    return f"The cache of {caches.lowered[0]} is in {caches.scheme}, whose scales are measured on text before keys and values come: export it with its check (without --no-check), or pin it to base and solve again."
