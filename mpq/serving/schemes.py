"""Formats in compressed-tensors' words, as engines read them.

The key names and values are those of compressed-tensors 0.20 (QuantizationConfig, QuantizationScheme, QuantizationArgs), which the
tests read them back with. Each group has its own `format`: vLLM finds no scheme without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# format → (type, how the group's tensors are stored)
SCHEMES = {"int8": ("int", "int-quantized"), "fp8_e4m3": ("float", "float-quantized")}


def scheme_group(name: str, targets: Iterable[str]) -> dict[str, Any]:
    """A group of `config_groups` in the format `name`: its targets by module name, or `Linear` for all."""
    kind, stored = SCHEMES[name]
    args = {"num_bits": 8, "type": kind, "symmetric": True}
    return {
        "format": stored,
        "targets": list(targets),
        "weights": {**args, "strategy": "channel", "dynamic": False},
        "input_activations": {**args, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }


def all_in(name: str) -> dict[str, Any]:
    """The `quantization_config` of a model whose linears are all in the format `name`, its head and experts in base."""
    group = scheme_group(name, ["Linear"])
    return {
        "quant_method": "compressed-tensors",
        "format": group["format"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*[.]experts[.].*", "re:.*[.]gate$", "re:.*[.]router$"],
    }
