"""Layers that are alike: a trace runs one of each kind, and repeats its operations for the others.

Tracing a layer takes up to some ten seconds (linear attention's loops), and a model has dozens.
Within `each_kind_once` a call of a layer that is like one that ran is one node of the trace;
`unrolled` puts the operations of the one that ran in its place. Alike are layers of one list

- whose modules have the same classes, attributes and shapes of tensors, a layer's number apart;
- that are called with tensors of the same shapes, and with plain values that are equal;
- of which the first one made nothing of its number (looked up which kind of attention it has,
  say), left what it was given as it was, and neither read nor handed on anything else.

Any other layer is traced by itself, and where that comes out too late, all are.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers import PretrainedConfig

from mpq.models.linears import holders

log = logging.getLogger(__name__)
_NUMBER = re.compile(r"layer_?(idx|id|index|number|num)$|^(idx|index)$")  # attributes
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class UnlikeLayersError(Exception):
    """Layers that seemed alike are not: trace each by itself."""


@torch.library.custom_op("mpq::border", mutates_args=())
def _border(tensors: list[Tensor], layer: str) -> list[Tensor]:
    """What goes into a layer that runs, or comes out of it, as it is."""
    return [t.clone() for t in tensors]


@torch.library.custom_op("mpq::as_before", mutates_args=())
def _as_before(given: list[Tensor], made: list[Tensor], layer: str, first: str) -> list[Tensor]:
    """What `layer` makes of `given` by the operations of the layer `first`: tensors that look like `made`."""
    return [torch.empty_like(t) for t in made]


_border.register_fake(lambda tensors, layer: [torch.empty_like(t) for t in tensors])
_as_before.register_fake(lambda given, made, layer, first: [torch.empty_like(t) for t in made])
_BORDER, _AS_BEFORE = torch.ops.mpq.border.default, torch.ops.mpq.as_before.default


@contextmanager
def each_kind_once(model: nn.Module) -> Iterator[None]:
    """Within, of the layers of a list that are alike the first one called runs; a call of each
    other is one node of the trace.

    The model raises UnlikeLayersError where a layer changes what it was given, or one that stands
    for others runs in another way, too.
    """
    ran: dict[Any, tuple[_Leaves, str] | None] = {}
    layers = list(_layers(model))
    try:
        for layer in layers:
            layer.module.forward = partial(_call, ran, layer, layer.kind, layer.module.forward)
        yield
    finally:
        for layer in layers:
            layer.module.__dict__.pop("forward", None)


def _call(
    ran: dict[Any, tuple[_Leaves, str] | None],
    layer: _Layer,
    kind: Any,
    forward: Any,
    *args: Any,
    **more: Any,
) -> Any:
    """A layer's forward within `each_kind_once`."""
    asked, leaves = _told((args, more)), _Leaves.of((args, more))
    if run := ran.get((kind, asked)):
        made, first = run
        return made.replaced(_as_before(leaves.tensors, made.tensors, layer.name, first))
    if any(run and run[1] == layer.name for run in ran.values()):
        raise UnlikeLayersError(f"{layer.name} runs in two ways")
    given = _Leaves.of(leaves.replaced(_border(leaves.tensors, layer.name)))
    before = layer.kind, [t._version for t in given.tensors]
    with _watched(layer.module) as used:
        result = forward(*given.whole[0], **given.whole[1])
    if asked != _told(given.whole) or before != (layer.kind, [t._version for t in given.tensors]):
        raise UnlikeLayersError(f"{layer.name} changes what it is given")
    made = _Leaves.of(result)
    made = _Leaves.of(made.replaced(_border(made.tensors, layer.name)))
    alike = not (used or _objects(asked) or _objects(_told(result)))
    ran[kind, asked] = (made, layer.name) if alike else None
    return made.whole


@dataclass(frozen=True)
class _Leaves:
    """What a call is given or returns, by its leaves."""

    whole: Any
    leaves: list[Any]
    inside: TreeSpec

    @classmethod
    def of(cls, whole: Any) -> _Leaves:
        return cls(whole, *tree_flatten(whole))

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in self.leaves if isinstance(t, Tensor)]

    def replaced(self, tensors: list[Tensor]) -> Any:
        """The same with other tensors."""
        of = iter(tensors)
        leaves = [next(of) if isinstance(t, Tensor) else t for t in self.leaves]
        return tree_unflatten(leaves, self.inside)


@dataclass(frozen=True)
class _Layer:
    """One of a list of layers called `of`, lists within layers left out."""

    of: str
    name: str
    module: nn.Module
    held: dict[int, int]

    @property
    def kind(self) -> Any:
        """What is equal for layers that are alike."""
        parts = ((name, _part(m, self.held)) for name, m in self.module.named_modules())
        return self.of, *parts


def _layers(model: nn.Module) -> Iterator[_Layer]:
    held, last = holders(model), ""
    for of, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (last and of.startswith(f"{last}.")):
            last = of
            for child, layer in module.named_children():
                yield _Layer(of, f"{of}.{child}", layer, held)


def _part(module: nn.Module, held: dict[int, int]) -> Any:
    """What is equal for the same module of layers of one kind."""
    own = {
        key: value
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers", "_modules")
        and not _is_number(key, value)
        and not (isinstance(value, partial) and value.func is _call)
    }
    tensors = {**module._parameters, **module._buffers}
    shared = [id(t) for t in tensors.values() if held.get(id(t), 0) > 1]
    return type(module), _told(own), _told(tensors), tuple(shared)


def _is_number(key: str, value: object) -> bool:
    return type(value) is int and bool(_NUMBER.search(key))


@dataclass(frozen=True)
class _Object:
    """One of those whose state nobody can tell."""

    id: int


def _told(value: Any) -> Any:
    """What equal values have in common, to be a key: of tensors what they look like, of unknown
    objects which one it is."""
    if isinstance(value, Tensor):
        return Tensor, tuple(value.shape), value.dtype
    if value is None or isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, dict):
        return type(value), tuple((_told(k), _told(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_told, value))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_told, value))
    if isinstance(value, PretrainedConfig):
        return type(value), _told(vars(value))
    if isinstance(value, partial):
        return partial, _told(value.func), _told(value.args), _told(value.keywords)
    return _Object(id(value))


def _objects(told: Any) -> bool:
    """Whether what `_told` says has an unknown object in it."""
    if isinstance(told, tuple | frozenset):
        return any(map(_objects, told))
    return isinstance(told, _Object)


class _Number:
    """A layer's number that tells `used` when anything is made of it."""

    def __init__(self, value: int, used: list[str]) -> None:
        self._value, self._used = value, used

    def __getattr__(self, name: str) -> Any:
        self._used.append(name)
        return getattr(self._value, name)


def _of_int(name: str) -> Any:
    return lambda self, *others: _Number.__getattr__(self, name)(*others)


_COMPARED = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__")
for _name in {*dir(int)} - {*dir(object)} | {*_COMPARED, "__str__", "__repr__", "__format__"}:
    if _name.startswith("__"):
        setattr(_Number, _name, _of_int(_name))


@contextmanager
def _watched(layer: nn.Module) -> Iterator[list[str]]:
    """Within, the layer's modules have numbers that tell when something is made of them."""
    used: list[str] = []
    numbers = [
        (module, key, value)
        for module in layer.modules()
        for key, value in vars(module).items()
        if _is_number(key, value)
    ]
    try:
        for module, key, value in numbers:
            module.__dict__[key] = _Number(value, used)
        yield used
    finally:
        for module, key, value in numbers:
            module.__dict__[key] = value


def unrolled(program: Any) -> list[fx.Node]:
    """The nodes of an exported program with the operations of every layer, in execution order.

    Raises UnlikeLayersError where a layer that stands for others reads or hands on what it was not
    called with.
    """
    graph, signature = program.graph, program.graph_signature
    calls = [node for node in graph.nodes if node.target is _AS_BEFORE]
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    inputs = {held[n.name]: n for n in graph.nodes if n.name in held}
    inside = {first: _inside(graph, first) for first in {call.args[3] for call in calls}}
    whole, now = fx.Graph(), dict[Any, Any]()  # a node of the program → what it is in the whole
    for node in graph.nodes:
        if node.target is not _AS_BEFORE:
            _place(node, whole, now)
            continue
        given, _, layer, first = node.args
        entry, *operations = inside[first]
        here: dict[Any, Any] = {entry: [now[g] for g in given]}
        for of in operations:
            for a in of.all_input_nodes:
                if a not in here:
                    here[a] = now[_counterpart(a, first, layer, held, inputs)]
            _place(of, whole, here, first, layer)
        now[node] = here[operations[-1]]
    log.info("%d layers are like others: their operations are repeated.", len(calls))
    return list(whole.nodes)


def _place(
    node: fx.Node, whole: fx.Graph, now: dict[Any, Any], first: str = "", layer: str = ""
) -> None:
    """Put a node of the layer `first`, for the layer `layer`, into the `whole`; borders are left out."""
    if node.target is _BORDER:
        now[node] = [now[a] for a in node.args[0]]  # type: ignore[union-attr]
    elif node.target is operator.getitem and isinstance(now[node.args[0]], list):
        now[node] = now[node.args[0]][node.args[1]]
    else:
        now[node] = whole.node_copy(node, now.__getitem__)
        if first:
            stack = node.meta["nn_module_stack"]
            of = {key: (_renamed(name, first, layer), kind) for key, (name, kind) in stack.items()}
            now[node].meta["nn_module_stack"] = of


def _renamed(name: str, first: str, layer: str) -> str:
    inside = f"{name}.".startswith(f"{first}.")
    return layer + name.removeprefix(first) if inside else name


def _inside(graph: fx.Graph, layer: str) -> list[fx.Node]:
    """What a layer that stands for others does, from border to border."""
    nodes = [
        node
        for node in graph.nodes
        if any(of == layer for of, _ in (node.meta.get("nn_module_stack") or {}).values())
    ]
    borders = [i for i, node in enumerate(nodes) if node.target is _BORDER]
    inside = nodes[: borders[-1] + 1]
    if len(borders) != 2 or borders[0] or any(node.target is _AS_BEFORE for node in inside):
        raise UnlikeLayersError(f"{layer} runs in other ways than by its call")
    among = set(inside)
    for node in inside[:-1]:
        if not among.issuperset(node.users):
            raise UnlikeLayersError(f"{node.name} of {layer} is read elsewhere")
    return inside


def _counterpart(
    node: fx.Node, first: str, layer: str, held: dict[str, str], inputs: dict[str, fx.Node]
) -> fx.Node:
    """What `layer` reads where the layer `first` reads a node that it was not called with: its own
    parameter, or a constant."""
    if node.op == "call_function":
        raise UnlikeLayersError(f"{first} reads {node.name}, which it was not called with")
    name = held.get(node.name, "")
    return inputs[_renamed(name, first, layer)] if name.startswith(f"{first}.") else node
