"""What blocks' scales are shares of, for each op that has such: of its weight, and of its input, whose range is measured on text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mpq.errors import MpqError
from mpq.export.codes import share_of_weight
from mpq.export.engines import fused_together
from mpq.export.shards import Shard, Shares
from mpq.formats.format import get_format
from mpq.formats.quantize import share_of
from mpq.formats.scheme import get_scheme
from mpq.models.blocks import Blocks
from mpq.models.dense import Dense, tensors_by_file
from mpq.models.placement import device_of

if TYPE_CHECKING:
    from torch import nn

BATCH = 2


def shares_of(
    shards: Sequence[Shard],
    source: Path,
    lowered: Mapping[str, str],
    base: str,
    engine: str,
    blocks: Blocks | None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Shares]:
    """For each op with blocks that share a tensor's scale what is in its checkpoint, the same for what `engine` multiplies at
    once. An input's is that of its largest magnitude in `blocks`. Raises MpqError where that is asked for without text."""
    sharing = {op for op, name in lowered.items() if get_scheme(name).weights.scale == "e4m3"}
    if not sharing:
        return {}
    dtype = getattr(torch, get_format(base).dtype)
    own: dict[str, float] = {}
    pieces = [piece for shard in shards for piece in shard.pieces if piece.format]
    for file, parts in tensors_by_file(source):
        for piece in (piece for piece in pieces if piece.file == file):
            op, part = piece.name.removesuffix(".weight"), parts[piece.tensor]
            if op in sharing:
                weight = part[...] if isinstance(part, Dense) else part
                of = get_scheme(piece.format).weights
                own[op] = share_of_weight(weight, of, dtype, piece.tensor)
    for together in fused_together(own, engine):
        own |= dict.fromkeys(together, min(own[op] for op in together))
    rounded = {op for op in own if get_scheme(lowered[op]).activations is not None}
    largest = _largest_inputs(rounded, source, lowered, base, blocks, device, trust_remote_code)
    return {op: (share, largest.get(op)) for op, share in own.items()}


def _largest_inputs(
    ops: Collection[str],
    source: Path,
    lowered: Mapping[str, str],
    base: str,
    blocks: Blocks | None,
    device: str,
    trust_remote_code: bool,
) -> dict[str, float]:
    from mpq.models.checkpoint import load_model

    if not ops:
        return {}
    if blocks is None:
        op = min(ops)
        raise MpqError(
            f"{op} runs in {lowered[op]}, whose activations have a scale that is measured on text before they come: export it with its check (without --no-check), or make the plan with {lowered[op]}a16."
        )
    model = load_model(source, base, device, trust_remote_code)
    largest = dict.fromkeys(ops, torch.zeros(1))

    def see(op: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            largest[op] = torch.maximum(largest[op], inputs[0].abs().amax().float().cpu())

        return hook

    handles = [model.get_submodule(op).register_forward_pre_hook(see(op)) for op in ops]
    with torch.inference_mode():
        for tokens in blocks.batches(BATCH, str(device_of(model))):
            model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    formats = {op: get_scheme(lowered[op]).activations for op in ops}
    return {op: share_of(largest[op], fmt) for op, fmt in formats.items() if fmt is not None}
