"""Which modules are linears, so that their weight alone says what they compute."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# subclasses of nn.Linear whose forward is the same product, written out
_WRITTEN_OUT = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes x Wᵀ + b and nothing else: its forward is nn.Linear's own, that of GPT-2's Conv1D, or one
    that is known to be the same.

    A subclass with a forward of its own (routers of experts that also choose, quantized layers) is none.
    """
    own = type(module)
    if isinstance(module, nn.Linear):
        known = f"{own.__module__}.{own.__qualname__}" in _WRITTEN_OUT
        return known or own.forward is nn.Linear.forward
    return isinstance(module, Conv1D) and own.forward is Conv1D.forward


def weight_of(module: nn.Module) -> Tensor:
    """The weight (C, K) of a linear; Conv1D keeps it as (K, C)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def holders(model: nn.Module) -> dict[int, int]:
    """id of each parameter → how many modules hold it: more than one where weights are tied."""
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count
