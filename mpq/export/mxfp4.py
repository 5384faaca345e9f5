"""A checkpoint in gpt-oss's own way: every layer's experts in MXFP4, all else in base.

So are OpenAI's checkpoints stored. Names and layouts are those that transformers 5.23
(integrations/mxfp4.py, Mxfp4Config) and vLLM 0.32 (models/gpt_oss.py, quantization/mxfp4.py) read,
both for gpt-oss alone; of the weight of a layer's experts (experts, C, K):

    …_blocks   U8 (experts, C, K / 32, 16), two E2M1 codes a byte, the first one low
    …_scales   U8 (experts, C, K / 32), E8M0: the exponent + 127
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mpq.errors import MpqError
from mpq.export.layout import Layout
from mpq.export.skeleton import Skeleton
from mpq.formats.scheme import Scheme, with_fitted

HELD = with_fitted("mxfp4a16")
_BLOCK = 32


def check_held(lowered: Mapping[str, str], base: str, model: Skeleton) -> None:
    """Raise MpqError for another model than gpt-oss, for lowered linears, other formats, and
    experts in base beside lowered ones."""
    if model.model_type != "gpt_oss":
        raise MpqError(
            f"gpt-oss alone has checkpoints in the form mxfp4, and this is a {model.model_type}: export to compressed-tensors."
        )
    for op, name in lowered.items():
        if op not in model.expert_ops:
            raise MpqError(
                f"{op} runs in {name} in this plan, but a checkpoint in the form mxfp4 holds lowered experts alone: pin {op} to base and solve again."
            )
        if name not in HELD:
            raise MpqError(
                f"{op} runs in {name} in this plan, but a checkpoint in the form mxfp4 holds experts in {', '.join(HELD)} alone: solve again with these."
            )
    if lowered and (kept := [op for op in model.expert_ops if op not in lowered]):
        raise MpqError(
            f"A checkpoint in the form mxfp4 has the experts of all layers in it, but the plan has {kept[0]} in {base}: pin *.experts.* to {HELD[0]} and solve again."
        )


def sizes(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, int]:
    """Bytes of the parts of a weight (experts, K, C), as gpt-oss keeps it in base."""
    elements = math.prod(shape)
    return {"blocks": elements // 2, "scales": elements // _BLOCK}


def laid_out(tensors: Mapping[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """The parts of all experts' weights, of codes.py's, one expert's after the other's."""
    return {
        "blocks": tensors["weight_packed"].unflatten(-1, (-1, _BLOCK // 2)),
        "scales": tensors["weight_scale"],
    }


def section(lowered: Mapping[str, str], model: Skeleton) -> dict[str, Any]:
    """The `quantization_config` of config.json; what is not converted is told by patterns, as
    OpenAI's checkpoints tell it."""
    kept = ("self_attn", "mlp.router")
    layers = [f"model.layers.*.{name}" for name in kept]
    others = [f"{model.head}", model.embedding.removesuffix(".weight")]
    return {"quant_method": "mxfp4", "modules_to_not_convert": [*layers, *others]}


LAYOUT = Layout(
    section=section,
    reading="codes",
    check_held=check_held,
    sizes=sizes,
    laid_out=laid_out,
    stacked=True,
)
