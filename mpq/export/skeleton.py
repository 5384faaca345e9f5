"""A model without its weights: what its linears are called, which weights are shared, what the checkpoint calls them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mpq.models.graph import build_on_meta
from mpq.models.linears import is_linear


@dataclass(frozen=True)
class Skeleton:
    """Names in the model, in its own order.

    `linears` are all nn.Linear, `plain` those of them that compute x Wᵀ + b and nothing else, `transposed` GPT-2's Conv1D.
    `shared` has the names of each weight that several modules hold, `parameters` all names, `head` the output embedding's
    module and `embedding` the input embedding's weight, "" where there is none.
    """

    linears: tuple[str, ...]
    plain: frozenset[str]
    transposed: frozenset[str]
    shared: tuple[frozenset[str], ...]
    parameters: frozenset[str]
    head: str
    embedding: str
    prefix: str
    experts: tuple[str, ...] = ()  # modules that hold a layer's experts, fused or one by one

    def name_of(self, tensor: str) -> str:
        """What the model calls a tensor of the checkpoint: old checkpoints leave the base model's prefix out, or have it alone."""
        for name in (tensor, f"{self.prefix}.{tensor}", tensor.removeprefix(f"{self.prefix}.")):
            if name in self.parameters:
                return name
        return tensor

    def sharing(self, parameter: str) -> frozenset[str]:
        """All names of the weight called `parameter`, its own included."""
        return next((names for names in self.shared if parameter in names), frozenset({parameter}))


def skeleton(config: Any) -> Skeleton:
    """The names in the model of this transformers configuration; no weight is read."""
    model = build_on_meta(config)
    modules = dict(model.named_modules())
    holders = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)].add(name)
    names_of = {id(module): name for name, module in modules.items()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    linears = tuple(name for name, module in modules.items() if isinstance(module, nn.Linear))
    return Skeleton(
        linears=linears,
        plain=frozenset(name for name in linears if is_linear(modules[name])),
        transposed=frozenset(n for n, module in modules.items() if isinstance(module, Conv1D)),
        shared=tuple(frozenset(names) for names in holders.values() if len(names) > 1),
        parameters=frozenset(model.state_dict()) | frozenset().union(*holders.values()),
        head=names_of.get(id(head), ""),
        embedding=f"{names_of.get(id(embedding), '')}.weight".lstrip("."),
        prefix=str(getattr(model, "base_model_prefix", "")),
        experts=tuple(n for n in modules if n.rpartition(".")[2] == "experts"),
    )
