"""A checkpoint in ModelOpt's way, as its `export_hf_checkpoint` writes one: names and layouts of tensors, and what is said of them.

Names, layouts and sections are those of nvidia-modelopt 0.47 (torch/export: quant_utils.py, convert_hf_config.py), whose own
dequantization the tests read them back with:

    FP8_PER_CHANNEL_PER_TOKEN  weight E4M3 (C, K), weight_scale FP32 (C)
    fp8_pb_wo                  weight E4M3 (C, K), weight_scale FP32 (C / 128, 1, K / 128, 1)
    MXFP8                      weight E4M3 (C, K), weight_scale E8M0 as its exponent + 127 (C, K / 32)
    NVFP4, W4A16_NVFP4         weight U8 (C, K / 2), weight_scale E4M3 (C, K / 16), weight_scale_2 FP32; NVFP4: input_scale FP32
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mpq.errors import MpqError
from mpq.export.expressible import check_held as check_schemes
from mpq.export.layout import Layout
from mpq.export.skeleton import Skeleton
from mpq.formats.scheme import get_scheme, with_fitted

CONFIG = "hf_quant_config.json"
# the version whose form is written, and which other tools look for in `producer`
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_ALGORITHMS: dict[str, dict[str, Any]] = {
    "fp8_e4m3": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    "fp8_block": {"quant_algo": "fp8_pb_wo"},  # so written there; vLLM reads either case
    "mxfp8": {"quant_algo": "MXFP8", "group_size": 32},
    "nvfp4": {"quant_algo": "NVFP4", "group_size": 16},
    "nvfp4a16": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
}
HELD = with_fitted(*_ALGORITHMS)
# of these, what vLLM 0.32 reads a layer's experts in (quantization/modelopt.py: ModelOptMixedPrecisionConfig.get_quant_method): FP8
# it takes for one scale a tensor
OF_EXPERTS = with_fitted("mxfp8", "nvfp4", "nvfp4a16")
# compressed-tensors' names of what is called otherwise here
_NAMES = {
    "weight_packed": "weight",
    "weight_global_scale": "weight_scale_2",
    "input_global_scale": "input_scale",
}


def check_held(lowered: Mapping[str, str], base: str, model: Skeleton) -> None:
    """Raise MpqError for a base that no engine runs beside it, and formats that it has no name for."""
    if lowered and base == "fp32":
        raise MpqError(
            "Engines run ModelOpt's checkpoints in 16 bits, but the plan's base is fp32: make the plan with base bf16."
        )
    check_schemes(lowered, model, "a ModelOpt checkpoint", HELD, OF_EXPERTS)


def laid_out(tensors: Mapping[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """The tensors of a weight (codes.py) as ModelOpt names and lays them out. Scales of a tensor are the inverse of shares, exactly:
    those are powers of two."""
    found = {_NAMES.get(end, end): tensor for end, tensor in tensors.items()}
    for end in ("weight_scale_2", "input_scale"):
        if end in found:
            found[end] = found[end].reshape(()).reciprocal()
    weights = get_scheme(scheme).weights
    if not weights.by_blocks:
        found["weight_scale"] = found["weight_scale"].flatten()
    elif weights.block[0] > 1:
        found["weight_scale"] = found["weight_scale"][:, None, :, None]
    return found


def quantization(lowered: Mapping[str, str], model: Skeleton) -> dict[str, Any]:
    """The content of hf_quant_config.json. Where several algorithms are there each op has its own in `quantized_layers`.

    What stays in base is in `exclude_modules` in either case; ModelOpt itself leaves it out beside `quantized_layers`. Experts are
    there one by one.
    """
    layers = {
        module: _algorithm(name)
        for op, name in lowered.items()
        for module in model.one_by_one.get(op, (model.coded(op),))
    }
    algorithms = {algorithm["quant_algo"] for algorithm in layers.values()}
    told: dict[str, Any] = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    if len(algorithms) == 1:
        told = next(iter(layers.values()))
    owners = {op.rpartition(".")[0] for op in lowered}
    held = (*model.linears, *model.weights)
    kept = [model.called.get(op, op) for op in held if op not in lowered]
    kept += [f"{model.called.get(n, n)}*" for n in model.experts if n not in owners]
    said = {**told, "kv_cache_quant_algo": None, "exclude_modules": sorted(kept)}
    return {"producer": _PRODUCER, "quantization": said}


def quantization_config(lowered: Mapping[str, str], model: Skeleton) -> dict[str, Any]:
    """The section of config.json that says what hf_quant_config.json does."""
    beside = quantization(lowered, model)
    of = beside["quantization"]
    layers: dict[str, dict[str, Any]] = of.get("quantized_layers", {})
    targets: dict[str, list[str]] = {}
    for op, algorithm in sorted(layers.items()):
        targets.setdefault(algorithm["quant_algo"], []).append(op)
    groups = targets or {of["quant_algo"]: ["Linear"]}
    section: dict[str, Any] = {
        "config_groups": {
            f"group_{number}": {**_operands(name), "targets": ops}
            for number, (name, ops) in enumerate(groups.items())
        }
    }
    if layers:
        section["quantized_layers"] = layers
    return {
        **section,
        "ignore": of["exclude_modules"],
        "quant_algo": of["quant_algo"],
        **({"group_size": of["group_size"]} if "group_size" in of else {}),
        "producer": beside["producer"],
        "quant_method": "modelopt",
    }


def _beside(lowered: Mapping[str, str], model: Skeleton) -> Iterator[tuple[str, str]]:
    yield CONFIG, json.dumps(quantization(lowered, model), indent=4)


def _algorithm(name: str) -> dict[str, Any]:
    return _ALGORITHMS[name.removesuffix("_mse")]


def _operands(algorithm: str) -> dict[str, Any]:
    """What a group says of its operands, as ModelOpt says it: `dynamic` is false there for every one."""
    name = next(n for n, a in _ALGORITHMS.items() if a["quant_algo"] == algorithm)
    scheme = get_scheme(name)
    told: dict[str, Any] = {"dynamic": False, "num_bits": scheme.weights.bits, "type": "float"}
    if size := _ALGORITHMS[name].get("group_size"):
        told["group_size"] = size
    found = {} if scheme.activations is None else {"input_activations": dict(told)}
    if not scheme.weights.by_blocks:
        told["strategy"] = "channel"
    return {**found, "weights": told}


LAYOUT = Layout(
    section=quantization_config,
    reading="values",  # transformers does not read it
    check_held=check_held,
    laid_out=laid_out,
    beside=_beside,
)
