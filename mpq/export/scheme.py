"""A checkpoint in compressed-tensors' way: the `quantization_config` of config.json. What a weight
becomes: codes.py.

Written by hand, so that a checkpoint is streamed and never is a model in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mpq.export.cache import SECTION
from mpq.export.layout import Layout
from mpq.export.skeleton import Skeleton
from mpq.serving.schemes import EXPORTED, scheme_group, section


def quantization_config(lowered: Mapping[str, str], model: Skeleton) -> dict[str, Any]:
    """The section of config.json: a group for each format, targets by module name, every other
    linear in `ignore`.

    Modules that transformers calls otherwise than the checkpoint are there under both names.
    Experts are targets by a pattern: a checkpoint and engines have a module for each, transformers
    has none.
    """
    targets: dict[str, list[str]] = {name: [] for name in EXPORTED}
    for op, name in lowered.items():
        of_experts = op in model.expert_ops
        targets[name] += [expert_pattern(op)] if of_experts else model.names_in_file(op)
    if model.expert_ops and not any(op in lowered for op in model.expert_ops):
        targets["fp8_e4m3"].append(_NO_EXPERTS)
    in_base = (
        name
        for op in (*model.linears, *model.weights)
        if op not in lowered
        for name in model.names_in_file(op)
    )
    return {
        **section(targets, (*in_base, *_experts_in_base(lowered, model))),
        "kv_cache_scheme": None,  # cache.py, where one is
        "global_compression_ratio": None,
    }


def _experts_in_base(lowered: Mapping[str, str], model: Skeleton) -> Iterator[str]:
    """Patterns of experts in base: an engine that fuses them asks for each by a name that no module
    has here."""
    for name in model.experts:
        ops = [op for op in model.expert_ops if op.rpartition(".")[0] == name]
        if any(op in lowered for op in ops):
            yield from (expert_pattern(op) for op in ops if op not in lowered)
        else:
            yield f"re:{_place(name)}experts[.].*"


# transformers reads a layer's experts by the group whose targets name experts, or else by the first: in base they are left
# alone by one in FP8, and lost by one in INT8 (integrations/compressed_tensors.py, 5.23). This matches no module.
_NO_EXPERTS = "re:none of the experts"


def without_experts(section: Mapping[str, Any]) -> dict[str, Any]:
    """A `quantization_config` of ours whose experts are in base, empty where nothing else is
    lowered, the cache of keys and values neither."""
    groups = {}
    for name, group in section["config_groups"].items():
        if targets := [t for t in group["targets"] if not t.startswith("re:")]:
            groups[name] = {**group, "targets": targets}
    none = scheme_group("fp8_e4m3", [_NO_EXPERTS])
    if not groups and not section.get("kv_cache_scheme"):
        return {}
    return {**section, "config_groups": {"experts": none, **groups}}


# what checkpoints call the parts of the two products of an expert
_PARTS = {"down_proj": "down_proj|w2"}


def expert_pattern(op: str) -> str:
    """What matches the modules of every expert that `op` stands for: in the op's layer, by any of
    their usual names."""
    owner, _, product = op.rpartition(".")
    return f"re:{_place(owner)}{owner.rpartition('.')[2]}[.]\\d+[.]({_PARTS.get(product, 'gate_proj|up_proj|w1|w3')})$"


def _place(module: str) -> str:
    """What matches whatever is before a layer's experts: the layer, below the modules that hold all
    of them, which engines call as transformers does but order otherwise
    (`language_model.model.layers` of a multimodal model)."""
    place = re.match(r"(.*[.])?([^.]+[.]\d+[.])", module)
    if not place:
        return ".*"
    above = "|".join(re.escape(part) for part in (place[1] or "").split(".") if part)
    return (
        f"(({above})[.])*{re.escape(place[2])}(.*[.])?"
        if above
        else f"{re.escape(place[2])}(.*[.])?"
    )


LAYOUT = Layout(quantization_config, "codes", cache=SECTION)
