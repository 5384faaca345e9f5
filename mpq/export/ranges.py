"""What blocks' scales are shares of, for each op that has such: of its weight, and of its input, whose range is measured on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.export.codes import share_of_weight
from mpq.export.engines import fused_together
from mpq.export.shards import Shard, Shares, whole
from mpq.formats.format import get_format
from mpq.formats.quantize import share_of
from mpq.formats.scheme import get_scheme
from mpq.models.blocks import Blocks
from mpq.models.dense import tensors_by_file
from mpq.models.experts import ExpertProduct, Routing, dispatched, intercept_experts
from mpq.models.placement import device_of

BATCH = 2


def shares_of(
    shards: Sequence[Shard],
    source: Path,
    base: str,
    engine: str,
    blocks: Blocks | None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Shares]:
    """For each weight with blocks that share a tensor's scale, by its module's name, what is in its checkpoint, the same for what
    `engine` multiplies at once. An input's is that of its largest magnitude in `blocks`, of experts that of all. Raises MpqError
    where that is asked for without text."""
    pieces = {
        piece.module: piece
        for shard in shards
        for piece in shard.pieces
        if piece.format and get_scheme(piece.format).weights.scale == "e4m3"
    }
    if not pieces:
        return {}
    dtype = getattr(torch, get_format(base).dtype)
    own: dict[str, float] = {}
    for file, parts in tensors_by_file(source):
        for name, piece in pieces.items():
            if piece.file == file:
                weight = whole(parts[piece.tensor], piece)
                of = get_scheme(piece.format).weights
                own[name] = share_of_weight(weight, of, dtype, piece.tensor)
    for together in fused_together(own, engine):
        own |= dict.fromkeys(together, min(own[name] for name in together))
    rounded = {p.op: p.format for p in pieces.values() if get_scheme(p.format).activations}
    largest = _largest_inputs(rounded, source, base, blocks, device, trust_remote_code)
    return {name: (share, largest.get(pieces[name].op)) for name, share in own.items()}


class _Seen(ExpertProduct):
    """An experts' product that keeps the largest magnitude of what enters it."""

    largest = torch.zeros(1)

    def operand(self, x: Tensor, routing: Routing | None) -> Tensor:
        self.largest = torch.maximum(self.largest, x.abs().amax().float().cpu())
        return x


def _largest_inputs(
    formats: Mapping[str, str],
    source: Path,
    base: str,
    blocks: Blocks | None,
    device: str,
    trust_remote_code: bool,
) -> dict[str, float]:
    """What the blocks' scales of each op's input are shares of, of ops in `formats`."""
    from mpq.models.checkpoint import load_model

    if not formats:
        return {}
    if blocks is None:
        op = min(formats)
        raise MpqError(
            f"{op} runs in {formats[op]}, whose activations have a scale that is measured on text before they come: export it with its check (without --no-check), or make the plan with {formats[op]}a16."
        )
    model = load_model(source, base, device, trust_remote_code)
    largest = dict.fromkeys(formats, torch.zeros(1))
    seen: dict[str, dict[str, _Seen]] = {}

    def see(op: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest[op] = torch.maximum(largest[op], inputs[0].abs().amax().float().cpu())

        return hook

    handles = []
    for op in formats:
        owner, _, product = op.rpartition(".")
        if dispatched(module := model.get_submodule(owner)):
            seen.setdefault(owner, {})[product] = _Seen(module, product)
        else:
            handles.append(model.get_submodule(op).register_forward_pre_hook(see(op)))
    with torch.inference_mode(), intercept_experts(model, seen):
        for tokens in blocks.batches(BATCH, str(device_of(model))):
            model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    for owner, products in seen.items():
        largest |= {f"{owner}.{name}": product.largest for name, product in products.items()}
    rounds = {op: get_scheme(name).activations for op, name in formats.items()}
    return {op: share_of(largest[op], fmt) for op, fmt in rounds.items() if fmt is not None}
