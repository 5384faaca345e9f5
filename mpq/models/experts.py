"""A seam in a layer's experts: their two products, open to whoever measures or lowers them.

Transformers keeps a layer's experts as two tensors, `gate_up_proj` (`up_proj` where there is no gate) and `down_proj`,
(experts, …), and picks what multiplies them by a name in the configuration, as for attention. Experts that get products of
ours are given a private copy of their configuration that names `mpq`, and so are sent here.

Here tokens are sent to their experts as Transformers' grouped implementation sends them: the rows of one expert lie
together, and each of the two products is one call over all experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from mpq.errors import MpqError
from mpq.models.seam import NAME, diverted

_ACTIVE = "_mpq_experts"  # where a module keeps its products, and what it was configured with
_MARKS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")


@dataclass(frozen=True)
class Routing:
    """Which rows belong to which expert, of (token, choice) pairs sorted by expert.

    `order` (S,) is the place of each row among the pairs, token by token; the rows of expert e end before `ends[e]` (int32).
    """

    order: Tensor
    ends: Tensor
    choices: int

    def by_token(self, rows: Tensor) -> Tensor:
        """Rows sorted by expert, back in the order of (token, choice)."""
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(back), device=back.device)
        return rows[back]

    def of_experts(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has rows, and where they are."""
        start = 0
        for expert, end in enumerate(self.ends.tolist()):
            if end > start:
                yield expert, slice(start, end)
            start = end


class ExpertProduct:
    """One of the two products of a layer's experts, as Transformers computes it: override what is needed.

    The weight is read from the module at each call: (experts, C, K), a view where the module keeps it transposed.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    @property
    def weight(self) -> Tensor:
        """(experts, C, K)."""
        return expert_weight(self.module, self.name)

    @property
    def bias(self) -> Tensor | None:
        """(experts, C)."""
        return getattr(self.module, f"{self.name}_bias") if self.module.has_bias else None

    def operand(self, x: Tensor, routing: Routing | None) -> Tensor:
        """The rows as they shall enter the product: tokens (N, K), not yet sent to their experts, where there is no
        routing; else (S, K) sorted by expert."""
        return x

    def product(self, x: Tensor, routing: Routing) -> Tensor:
        """(S, C) of rows (S, K) sorted by expert, the bias added."""
        return with_bias(self.multiply(x, self.weight.mT, routing), self.bias, routing)

    def multiply(self, x: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        """The rows of each expert (S, K) times its matrix of `weights` (experts, K, C), by what the model is configured with."""
        grouped = getattr(self.module, _ACTIVE).implementation == "grouped_mm"
        function: Any = moe._grouped_mm if grouped else torch.ops.transformers.grouped_mm_fallback
        product: Tensor = function(x, weights, offs=routing.ends)
        return product


def with_bias(y: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """y (S, C) plus the bias (experts, C) of each row's expert."""
    if bias is None:
        return y
    rows = torch.arange(len(y), dtype=torch.int32, device=y.device)
    return y + bias[torch.searchsorted(routing.ends, rows, right=True)]


@dataclass(frozen=True)
class _Interception:
    products: Mapping[str, ExpertProduct]
    implementation: str


def dispatched(module: nn.Module) -> bool:
    """Whether Transformers picks what multiplies this module's experts by name, so that products can be put into it."""
    if not all(hasattr(module, mark) for mark in _MARKS) or not hasattr(module, "_apply_gate"):
        return False
    return not module._is_expert_parallel and all(
        getattr(module, name, None) is not None for name in products_of(module)
    )


def products_of(module: nn.Module) -> tuple[str, str]:
    """The names of a dispatched module's two products, in order."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def expert_weight(module: nn.Module, name: str) -> Tensor:
    """(experts, C, K) of one of a dispatched module's products."""
    weight: Tensor = getattr(module, name)
    return weight.mT if module.is_transposed else weight


@contextmanager
def each_weight_once(model: nn.Module) -> Iterator[bool]:
    """Within, experts that are not dispatched multiply each of their weights once, by nothing in particular: their own forward loops
    over what the router chose, which no trace can follow. Yields whether there are any."""
    found = [
        m
        for name, m in model.named_modules()
        if name.rpartition(".")[2] == "experts" and not dispatched(m)
    ]

    def once(module: nn.Module, hidden: Tensor, *routing: Any, **more: Any) -> Tensor:
        for weight in (p for p in module.parameters() if p.ndim > 1):
            x = hidden.reshape(1, -1)[:, :1].expand(1, weight.shape[-1])
            if weight.ndim == 2:
                y = nn.functional.linear(x, weight)
            else:
                y = torch.bmm(x.expand(len(weight), 1, -1), weight.mT)
            hidden = hidden + y.sum()
        of_router = (t for t in (*routing, *more.values()) if isinstance(t, Tensor))
        return sum((t.sum() for t in of_router), hidden)

    try:
        for module in found:
            module.forward = partial(once, module)
        yield bool(found)
    finally:
        for module in found:
            del module.forward


Products: TypeAlias = Mapping[str, Mapping[str, ExpertProduct]]


@contextmanager
def intercept_experts(model: nn.Module, products: Products) -> Iterator[nn.Module]:
    """`model` with `products` (module → product's name → product) in its experts. Leaving restores everything; nested, the inner
    products stand for the outer.

    Raises MpqError where a name is no experts module that Transformers dispatches.
    """
    for name in products:
        if not dispatched(model.get_submodule(name)):
            raise MpqError(
                f"{name} ({type(model.get_submodule(name)).__name__}) holds no experts that Transformers dispatches by name."
            )
    prepared = []
    for name, of_module in products.items():
        module = model.get_submodule(name)
        outer: _Interception | None = module.__dict__.get(_ACTIVE)
        before: str = outer.implementation if outer else module.config._experts_implementation  # type: ignore[union-attr,assignment]
        plain = {p: ExpertProduct(module, p) for p in products_of(module)}
        prepared.append((module, _Interception({**plain, **of_module}, before)))
    with diverted(prepared, "_experts_implementation_internal", _ACTIVE):
        yield model


def _run(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The experts' function registered as `mpq`: hidden (N, H), the experts `chosen` for each token and their `weights` (N, choices)."""
    interception: _Interception = getattr(module, _ACTIVE)
    first, second = (interception.products[name] for name in products_of(module))
    experts, order = torch.sort(chosen.reshape(-1))
    each = torch.arange(module.num_experts, device=experts.device)
    ends = torch.searchsorted(experts, each, right=True).int()
    routing = Routing(order, ends, chosen.shape[-1])
    x = first.operand(hidden, None)[order // routing.choices]
    y = first.product(x, routing)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = second.product(second.operand(y, routing), routing)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    weighted = routing.by_token(y * weights.reshape(-1)[order].unsqueeze(-1))
    return weighted.view(len(hidden), routing.choices, -1).sum(dim=1).to(hidden.dtype)


moe.ALL_EXPERTS_FUNCTIONS.register(NAME, _run)
