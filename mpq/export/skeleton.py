"""A model without its weights: what its linears are called, which weights are shared, what the
checkpoint calls them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as _PATCHED

from mpq.models.attention import dispatched as attends
from mpq.models.experts import dispatched, products_of
from mpq.models.graph import build_on_meta
from mpq.models.linears import is_linear
from mpq.program.memory import keeping

# whose experts checkpoints keep in one tensor, gate before up, and which vLLM 0.32 alone reads one by one, by the names that it has
# for those of all others (fused_moe/routed_experts.py: build_expert_params_mapping; granitemoehybrid.py: get_expert_mapping)
_ONE_BY_ONE_IN_VLLM = (
    *("granitemoe", "granitemoeshared", "granitemoe_swa", "granitemoehybrid"),
    "qwen3_vl_moe",
)
_ENDS = ("_scale", "_packed")  # what codes and scales add to the name of a weight


def parts_of(product: str) -> tuple[str, ...]:
    """What the linears of one expert are called that make up a product of all."""
    return ("gate_proj", "up_proj") if product == "gate_up_proj" else (product,)


@dataclass(frozen=True)
class Skeleton:
    """Names in the model, in its own order.

    `linears` are all nn.Linear, `plain` those of them that compute x Wᵀ + b and nothing else,
    `transposed` GPT-2's Conv1D. `shared` has the names of each weight that several modules hold,
    `parameters` all names, `head` the output embedding's module and `embedding` the input
    embedding's weight, "" where there is none.
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
    expert_ops: tuple[str, ...] = ()  # the tensors in them that hold one product of all experts
    expert_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of `expert_ops`
    weights: tuple[
        str, ...
    ] = ()  # modules with a matrix that are neither linears nor embeddings, such as routers
    conversions: tuple[
        Any, ...
    ] = ()  # how transformers makes its parameters of a checkpoint's tensors
    apart: frozenset[str] = frozenset()  # modules of experts that compressed-tensors takes apart
    attentions: tuple[str, ...] = ()  # of the decoder's layers, with keys and values of their own
    caches_sized: bool = True  # whether compressed-tensors can tell how large theirs are
    model_type: str = ""
    as_is: bool = False  # whether the checkpoint's names differ from these within a layer
    called: Mapping[str, str] = field(
        default_factory=dict
    )  # linears, `weights` and `experts` → what the file calls them, if otherwise
    one_by_one: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # lowered `expert_ops` → each expert's modules in the file

    def name_of(self, tensor: str) -> str:
        """What the model calls a tensor of the checkpoint: old checkpoints leave the base model's
        prefix out, or have it alone, and many have other names for the model's parts."""
        return next((n for n in self._names(tensor) if n in self.parameters), tensor)

    def _names(self, tensor: str) -> Iterator[str]:
        """What the model may call it."""
        renamed, _ = rename_source_key(tensor, self._renamings, [])
        for at in (tensor, renamed):
            yield from (at, f"{self.prefix}.{at}", at.removeprefix(f"{self.prefix}."))

    def written(self, tensor: str) -> str:
        """What a tensor of the checkpoint is called once more: as in the model, which differs by
        what holds the layers at most; but as it is where transformers has other names within a
        layer, since engines know the checkpoint's alone there."""
        name, prefix = self.name_of(tensor), f"{self.prefix}."
        if not self.as_is or name in (f"{prefix}{tensor}", tensor.removeprefix(prefix)):
            return name
        return tensor

    def coded(self, op: str) -> str:
        """What a lowered linear is called in the file: as the rest of it, but as in the model where
        transformers would not know its scales again."""
        name = self.called.get(op, op)
        known = (f"{op}.weight{end}" in self._names(f"{name}.weight{end}") for end in _ENDS)
        return name if all(known) else op

    def names_in_file(self, module: str) -> tuple[str, ...]:
        """What the checkpoint, and so an engine, calls a module, and what transformers does: each
        looks for its own."""
        return tuple(dict.fromkeys((self.called.get(module, module), module)))

    @property
    def _renamings(self) -> list[WeightRenaming]:
        return [c for c in self.conversions if isinstance(c, WeightRenaming)]

    def taken_apart(self, tensor: str) -> str:
        """The module whose experts lie together in this tensor, and which transformers makes of a
        linear for each in a compressed-tensors checkpoint (Llama 4's); else ""."""
        owner = tensor.rpartition(".")[0]
        return owner if owner in self.apart else ""

    def expert_op(self, tensor: str) -> str:
        """The op of experts that transformers stacks this tensor of a checkpoint into, one expert's
        whole matrix; else ""."""
        converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        name, pattern = rename_source_key(tensor, self._renamings, converters)
        stacks = any(
            pattern in c.source_patterns
            and all(isinstance(op, MergeModulelist | Concatenate) for op in c.operations)
            for c in converters
        )
        return next((op for op in self.expert_ops if stacks and name.endswith(op)), "")

    @property
    def in_vllm_alone(self) -> bool:
        """Whether lowered experts have names in vLLM that transformers makes nothing of."""
        return self.model_type in _ONE_BY_ONE_IN_VLLM

    def read_one_by_one(self, op: str) -> bool:
        """Whether the experts of `op`, all in one tensor, are read under a name for each as well:
        by transformers, which stacks them, or by vLLM alone."""
        owner, _, product = op.rpartition(".")
        each = f"{owner}.0.{parts_of(product)[0]}.weight"
        return self.in_vllm_alone or self.expert_op(each) == op

    def sharing(self, parameter: str) -> frozenset[str]:
        """All names of the weight called `parameter`, its own included."""
        return next((names for names in self.shared if parameter in names), frozenset({parameter}))


def skeleton(config: Any, tensors: Collection[str] = ()) -> Skeleton:
    """The names in the model of this transformers configuration, and those of a checkpoint with
    these `tensors`; no weight is read."""
    model: Any = build_on_meta(config)
    modules = dict(model.named_modules())
    holders = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)].add(name)
    names_of = {id(module): name for name, module in modules.items()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linears = tuple(name for name, module in modules.items() if isinstance(module, nn.Linear))
    attentions = _attentions(modules, names_of.get(id(embedding), ""))
    found = Skeleton(
        linears=linears,
        plain=frozenset(name for name in linears if is_linear(modules[name])),
        transposed=frozenset(n for n, module in modules.items() if isinstance(module, Conv1D)),
        shared=tuple(frozenset(names) for names in holders.values() if len(names) > 1),
        parameters=frozenset(model.state_dict()) | frozenset().union(*holders.values()),
        head=names_of.get(id(head), ""),
        embedding=f"{names_of.get(id(embedding), '')}.weight".lstrip("."),
        prefix=str(getattr(model, "base_model_prefix", "")),
        experts=tuple(n for n in modules if n.rpartition(".")[2] == "experts"),
        expert_ops=tuple(
            f"{n}.{product}"
            for n, m in modules.items()
            if dispatched(m)
            for product in products_of(m)
        ),
        expert_shapes={
            f"{n}.{product}": tuple(getattr(m, product).shape)
            for n, m in modules.items()
            if dispatched(m)
            for product in products_of(m)
        },
        weights=tuple(
            n
            for n, m in modules.items()
            if not isinstance(m, nn.Linear | nn.Embedding | Conv1D)
            and getattr(m._parameters.get("weight"), "ndim", 0) == 2
        ),
        conversions=tuple(get_model_conversion_mapping(model)),
        apart=frozenset(
            n
            for n, m in modules.items()
            if (how := dict[str, Any](_PATCHED.get(type(m).__name__) or {}))
            and "compressed-tensors" in how["quantization_methods"]
        ),
        model_type=config.model_type,
        attentions=attentions,
        caches_sized=_caches_sized([modules[name] for name in attentions], config),
    )
    as_is = any(_in_layer(found.name_of(tensor)) != _in_layer(tensor) for tensor in tensors)
    found, called = replace(found, as_is=as_is), {}
    matrices = {*found.linears, *found.weights}
    for tensor in tensors if as_is else ():
        if (of := re.match(r"(.*[.]experts)[.]0[.]", tensor)) and (op := found.expert_op(tensor)):
            called[op.rpartition(".")[0]] = of[1]
        name, written = found.name_of(tensor), found.written(tensor)
        module = name.removesuffix(".weight")
        if written != name and module in matrices:
            called[module] = written.removesuffix(".weight")
    return replace(found, called=called)


def _in_layer(name: str) -> str:
    """A name from its layer on, "" where it lies in none."""
    found = re.search(r"(^|[.])\d+[.](.*)$", name)
    return found[2] if found else ""


def _attentions(modules: Mapping[str, nn.Module], embedding: str) -> tuple[str, ...]:
    """The attentions of the decoder's layers, which lie right beside the input `embedding`, those
    of an encoder elsewhere or deeper: such as keep keys and values of their own, since an engine
    would read another's by its own format."""
    in_layer = rf"{re.escape(embedding.rpartition('.')[0])}[.]\w+[.]\d+[.]"
    found = (
        name
        for name, module in modules.items()
        if re.match(in_layer, name) and "Attention" in type(module).__name__ and attends(module)
    )
    return keeping(found, modules)


# what an attention has of which compressed-tensors 0.20 rounds the cache (lifecycle/initialize.py:
# is_cached_attention_module), and what it asks the configuration for then (utils/helpers.py)
_SIMULATED = ("k_proj", "v_proj", "qkv_proj")
_KV_HEADS, _WIDTH = "num_key_value_heads", "head_dim"


def _caches_sized(attentions: Iterable[nn.Module], config: Any) -> bool:
    """Whether compressed-tensors loads a cache of these attentions: those that it knows need a
    configuration with the heads of keys and their width, one of each for all layers."""
    if not any(hasattr(module, part) for module in attentions for part in _SIMULATED):
        return True
    text = config.get_text_config(decoder=True)
    by_layer = getattr(text, "per_layer_attributes", None) or set()
    return not by_layer & {_KV_HEADS, _WIDTH} and hasattr(text, _KV_HEADS)
