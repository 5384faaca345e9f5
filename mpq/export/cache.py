"""The cache of keys and values in a checkpoint: which layers have it in FP8, with which scales, and what a server is told.

A file says that the cache is in FP8, and has a scale for K and one for V of each layer; which layers are excepted is a switch of
vLLM's server (0.32, model_executor/layers/attention/attention.py: kv_cache_dtype_skip_layers). Scales are in the file for these
as well: a server that is started without the switch rounds more than the plan does, but no worse than FP8 is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.export.skeleton import Skeleton
from mpq.formats.format import OF_TENSOR
from mpq.formats.quantize import scale_of
from mpq.formats.scheme import of_cache
from mpq.models.attention import AttentionHandler, intercept
from mpq.models.blocks import Blocks
from mpq.models.placement import device_of

BATCH = 2
PRODUCTS = ("qk_matmul", "av_matmul")
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


@dataclass(frozen=True)
class Caches:
    """The attentions of a model by name, those whose cache a plan has in FP8 and those that stay in base."""

    lowered: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def formats(self) -> dict[str, str]:
        """Op → scheme of the products that read a lowered cache."""
        (scheme,) = of_cache(("fp8_kv",))
        return {f"{name}.{product}": scheme for name in self.lowered for product in PRODUCTS}

    @property
    def layers(self) -> dict[str, list[int]]:
        """The numbers of the layers whose cache is in FP8, and of those in base; none where no cache is lowered."""
        if not self.lowered:
            return {}
        return {"fp8_kv": [*map(_layer, self.lowered)], "base": [*map(_layer, self.kept)]}

    @property
    def switches(self) -> list[str]:
        """What vLLM's server has to be told of it."""
        if not (self.lowered and self.kept):
            return []
        return ["--kv-cache-dtype-skip-layers", *map(str, self.layers["base"])]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of them, a sentence each."""
        if not self.lowered:
            return ()
        on_cpu = "vLLM 0.32 cuts keys and values on a CPU where it rounds them on a GPU: their KL is about four times as large there; see docs/engines.md"
        if not self.switches:
            return (on_cpu,)
        told = f"which layers' cache stays in base is in no file: start vLLM's server with {' '.join(self.switches)}; transformers rounds that of every layer"
        return (told, on_cpu)


def caches_of(
    formats: Mapping[str, str], model: Skeleton, to: str, engine: str, held: bool
) -> Caches:
    """The caches of a plan (op → format), in a kind of file that can say so where it is `held`.

    Raises MpqError for other files and engines than those that are known to have one, a layer with K and V apart, and what is no
    cache of the model.
    """
    lowered = {op: f for op, f in formats.items() if of_cache([f])}
    if not lowered:
        return Caches()
    first, scheme = next(iter(lowered.items()))
    if engine != "vllm" or not held:
        raise MpqError(
            f"{first} reads a cache in {scheme} in this plan, which mpq writes to compressed-tensors for vllm alone, not to {to} for {engine}: export it so, or pin *.qk_matmul and *.av_matmul to base and solve again."
        )
    names = dict.fromkeys(op.rpartition(".")[0] for op in lowered)
    for name in names:
        if any(f"{name}.{product}" not in lowered for product in PRODUCTS):
            raise MpqError(
                f"The plan has one of K and V of {name} in {scheme}, and the other not: a layer has one cache; tie {', '.join(f'*.{p}' for p in PRODUCTS)} and solve again."
            )
        if name not in model.attentions:
            raise MpqError(
                f"{name} keeps no keys and values that are its alone, which the plan has in {scheme}: pin *.qk_matmul and *.av_matmul to base and solve again."
            )
        if other := next((c for m, c in model.called.items() if m.startswith(f"{name}.")), None):
            raise MpqError(
                f"The checkpoint has {name} under another name ({other}), under which no engine was seen to read the scale of a cache: pin its products to base and solve again."
            )
    kept = tuple(name for name in model.attentions if name not in names)
    return Caches(tuple(name for name in model.attentions if name in names), kept)


def _layer(name: str) -> int:
    """The number by which vLLM calls a layer: the first in its name (extract_layer_index)."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else 0


class _Seen(AttentionHandler):
    """An attention that keeps the largest magnitudes of its keys and values."""

    def __init__(self) -> None:
        self.largest = torch.zeros(2)

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        now = torch.stack([x.abs().amax().float().cpu() for x in (key, value)])
        self.largest = torch.maximum(self.largest, now)
        return query, key, value


def scales_of(
    caches: Caches,
    source: Path,
    base: str,
    blocks: Blocks | None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """The scale of each layer's K and V by the tensor's name, from the largest magnitudes in `blocks`: none where no cache is
    lowered, all where one is. Raises MpqError where that is asked for without text."""
    from mpq.models.checkpoint import load_model

    if not caches.lowered:
        return {}
    if blocks is None:
        raise MpqError(
            f"The cache of {caches.lowered[0]} is in fp8_kv, whose scales are measured on text before keys and values come: export it with its check (without --no-check), or pin it to base and solve again."
        )
    model = load_model(source, base, device, trust_remote_code)
    seen = {name: _Seen() for name in (*caches.lowered, *caches.kept)}
    with torch.inference_mode(), intercept(model, seen):
        for tokens in blocks.batches(BATCH, str(device_of(model))):
            model(input_ids=tokens, use_cache=False)
    return {
        f"{name}.{end}": float(scale_of(largest.reshape(1, 1), OF_TENSOR))
        for name, of in seen.items()
        for end, largest in zip(_ENDS, of.largest, strict=True)
    }


def is_scale(key: str) -> bool:
    """Whether a tensor of a checkpoint is the scale of a cache."""
    return key.rpartition(".")[2] in _ENDS


def excepting(model: nn.Module, lowered: Collection[str]) -> list[str]:
    """Have transformers round keys and values as the server does, in the `lowered` layers and no others; those of them are returned
    in which it does not. compressed-tensors 0.20 rounds them as they enter the cache, in every attention that it knows."""
    simulated = {name for name, module in model.named_modules() if hasattr(module, "kv_cache")}
    for name in simulated - set(lowered):
        model.get_submodule(name).quantization_enabled = False  # type: ignore[assignment]
    return [name for name in lowered if name not in simulated]


def differing_scales(model: nn.Module, scales: Mapping[str, float]) -> list[str]:
    """Which scales of the caches that transformers rounds are not those of the plan, a line each."""
    wrong = []
    for key, scale in scales.items():
        name, _, end = key.rpartition(".")
        module = model.get_submodule(name)
        if hasattr(module, "kv_cache") and float(getattr(module, end)) != scale:
            wrong.append(f"the {end.replace('_', ' ')} of {name} is another")
    return wrong
