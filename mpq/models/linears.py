"""Which modules are linears, so that their weight alone says what they compute."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes x Wᵀ + b and nothing else: its forward is nn.Linear's own, or that of GPT-2's Conv1D.

    A subclass with a forward of its own (routers of experts that also choose, quantized layers) is none.
    """
    return (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward) or (
        isinstance(module, Conv1D) and type(module).forward is Conv1D.forward
    )


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
