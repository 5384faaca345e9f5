"""The cache of keys and values in a checkpoint: which layers have it in FP8, with which scales, and
what a server is told.

A file says that the cache is in FP8, and has a scale for K and one for V of each layer; which
layers are excepted is a switch of vLLM's server (0.32,
model_executor/layers/attention/attention.py: kv_cache_dtype_skip_layers). Scales are in the file
for these as well: a server that is started without the switch rounds more than the plan does, but
no worse than FP8 is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.export.skeleton import Skeleton
from mpq.formats.format import OF_TENSOR
from mpq.formats.quantize import scale_of
from mpq.formats.scheme import of_cache
from mpq.running.attention import PRODUCTS

#: what says so in compressed-tensors' section of config.json: its QuantizationArgs, as vLLM asks for them
SECTION = {
    "kv_cache_scheme": {
        "num_bits": OF_TENSOR.bits,
        "type": OF_TENSOR.kind,
        "strategy": "tensor",
        "symmetric": True,
        "dynamic": False,
    }
}
_ENDS = ("k_scale", "v_scale")  # behind an attention's name, of what its products read
# what vLLM 0.32 calls the part of an attention that has the scales: it takes `.attn.k_scale` for
# the name of one in the model (layers/quantization/base_config.py: get_cache_scale_mapper)
_IN_VLLM = "attn"
_PIN = f"pin {' and '.join(f'*.{p}' for p in PRODUCTS)} to base and solve again"


@dataclass(frozen=True)
class Caches:
    """The attentions of a model by name, those whose cache a plan has in a `scheme`, and those that
    stay in base."""

    lowered: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    scheme: str = ""

    @property
    def formats(self) -> dict[str, str]:
        """Op → scheme of the products that read a lowered cache."""
        return {f"{name}.{product}": self.scheme for name in self.lowered for product in PRODUCTS}

    @property
    def layers(self) -> dict[str, list[int]]:
        """The numbers of the layers whose cache is lowered, and of those in base; none where no
        cache is lowered."""
        if not self.lowered:
            return {}
        return {self.scheme: [*map(_layer, self.lowered)], "base": [*map(_layer, self.kept)]}

    @property
    def switches(self) -> list[str]:
        """What vLLM's server has to be told of it."""
        if not (self.lowered and self.kept):
            return []
        return ["--kv-cache-dtype-skip-layers", *map(str, self.layers["base"])]

    def notes(self, unread: Collection[str]) -> Iterator[str]:
        """What is to be known of them, a sentence each; `unread` are those that transformers was
        seen to leave in base."""
        if not self.lowered:
            return
        if self.switches:
            yield f"which layers' cache stays in base is in no file: start vLLM's server with {' '.join(self.switches)}"
        if unread:
            yield f"transformers rounds no cache of {', '.join(unread)}: what the check compared has them in base"
        elif self.switches:
            yield "transformers rounds the cache of every layer"
        yield "vLLM 0.32 cuts keys and values on a CPU where it rounds them on a GPU: their KL is about four times as large there; see docs/engines.md"


def caches_of(
    formats: Mapping[str, str], model: Skeleton, to: str, engine: str, held: bool
) -> Caches:
    """The caches of a plan (op → format), in a kind of file that can say so where it is `held`.

    Raises MpqError for other files and engines than those that are known to have one, what reads no
    cache, a layer with K and V apart, and caches that the model, transformers or vLLM does not
    have.
    """
    lowered = {op: f for op, f in formats.items() if of_cache([f])}
    if not lowered:
        return Caches()
    first, scheme = next(iter(lowered.items()))
    for op in lowered:
        name, _, product = op.rpartition(".")
        if not name or product not in PRODUCTS:
            raise MpqError(
                f"{op} is in {scheme} in this plan, a format that a layer's cache alone can have: expected it of {' and '.join(f'ATTENTION.{p}' for p in PRODUCTS)}; solve again."
            )
    if engine != "vllm" or not held:
        raise MpqError(
            f"{first} reads a cache in {scheme} in this plan, which mpq writes to compressed-tensors for vllm alone, not to {to} for {engine}: export it so, or {_PIN}."
        )
    names = dict.fromkeys(op.rpartition(".")[0] for op in lowered)
    for name in names:
        if any(f"{name}.{product}" not in lowered for product in PRODUCTS):
            raise MpqError(
                f"The plan has one of K and V of {name} in {scheme}, and the other not: a layer has one cache; tie {', '.join(f'*.{p}' for p in PRODUCTS)} and solve again."
            )
        _check_known(name, scheme, model)
    kept = tuple(name for name in model.attentions if name not in names)
    return Caches(tuple(name for name in model.attentions if name in names), kept, scheme)


def _check_known(name: str, scheme: str, model: Skeleton) -> None:
    """Raise MpqError for an attention whose cache the model, transformers or vLLM does not have."""
    if name not in model.attentions:
        raise MpqError(
            f"The plan has the cache of {name} in {scheme}, which is no attention of the decoder's layers with keys and values of its own: {_PIN}."
        )
    others = [other for other in model.attentions if _layer(other) == _layer(name)]
    if len(others) > 1:
        raise MpqError(
            f"The model has {len(others)} attentions in layer {_layer(name)} ({', '.join(others)}), which vLLM's server tells apart by that number alone: {_PIN}."
        )
    if name.endswith(f".{_IN_VLLM}"):
        raise MpqError(
            f"The plan has the cache of {name} in {scheme}, but vLLM opens no checkpoint with scales beside an attention called {_IN_VLLM}, its own name for a part of one: {_PIN}."
        )
    if other := next((c for m, c in model.called.items() if m.startswith(f"{name}.")), None):
        raise MpqError(
            f"The checkpoint has {name} under another name ({other}), under which no engine was seen to read the scale of a cache: {_PIN}."
        )
    if not model.caches_sized:
        raise MpqError(
            f"The plan has the cache of {name} in {scheme}, but config.json does not say num_key_value_heads and head_dim once for all layers, as transformers asks for to load such a checkpoint of a {model.model_type}, so that mpq could not check it (vLLM itself does not ask): {_PIN}."
        )


def _layer(name: str) -> int:
    """The number by which vLLM calls a layer: the first in its name (extract_layer_index)."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else 0


def scales_of(caches: Caches, largest: Mapping[str, Tensor]) -> dict[str, float]:
    """The scale of each layer's K and V by the tensor's name, from their `largest` magnitudes (2,)
    by attention: none where no cache is lowered, all where one is."""
    return {
        f"{name}.{end}": float(scale_of(largest_of.reshape(1, 1), OF_TENSOR))
        for name in (*caches.lowered, *caches.kept)
        for end, largest_of in zip(_ENDS, largest[name], strict=True)
    }


def is_scale(key: str) -> bool:
    """Whether a tensor of a checkpoint is the scale of a cache."""
    return key.rpartition(".")[2] in _ENDS


def excepting(model: nn.Module, lowered: Collection[str]) -> list[str]:
    """Have transformers round keys and values as the server does, in the `lowered` layers and no
    others; those of them are returned in which it does not. compressed-tensors 0.20 rounds them as
    they enter the cache, in every attention that it knows."""
    simulated = {name for name, module in model.named_modules() if hasattr(module, "kv_cache")}
    for name in simulated - set(lowered):
        model.get_submodule(name).quantization_enabled = False  # type: ignore[assignment]
    return [name for name in lowered if name not in simulated]


def differing_scales(model: nn.Module, scales: Mapping[str, float]) -> list[str]:
    """Which scales of the caches that transformers rounds are not those of the plan, a line
    each."""
    wrong = []
    for key, scale in scales.items():
        name, _, end = key.rpartition(".")
        module = model.get_submodule(name)
        if hasattr(module, "kv_cache") and float(getattr(module, end)) != scale:
            wrong.append(f"the {end.replace('_', ' ')} of {name} is another")
    return wrong
