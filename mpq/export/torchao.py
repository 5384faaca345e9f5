"""A checkpoint in torchao's way, as transformers writes one with `TorchAoConfig`: a configuration for each module, tensors in parts.

Names, attributes and configurations are those of torchao 0.18 (prototype/safetensors/safetensors_support.py, core/config.py),
whose own dequantization the check and the tests read them back with. A weight's parts are called `_weight_…`, and the header of
each file of weights says, for each weight of the checkpoint, which tensor class they make:

    Int8Tensor                 qdata INT8 (C, K), scale FP32 (C, 1)
    Float8Tensor               qdata E4M3 (C, K), scale FP32 (C, 1)
    IntxUnpackedToInt8Tensor   qdata INT8 (C, K), one code of four bits a byte, scale BF16 (C, K / block), zero_point INT8 of zeros

torchao packs four bits in layouts of single devices alone, which no code of its own reads back elsewhere. Its tensors of MX and
NVFP4 are prototypes, whose attributes are others in each version: a checkpoint of them would not outlive it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq.export.codes import sizes_of
from mpq.export.expressible import check_held as check_schemes
from mpq.export.layout import Layout
from mpq.export.shards import Shard
from mpq.export.skeleton import Skeleton
from mpq.formats.format import get_format
from mpq.formats.quantize import fake_quantize
from mpq.formats.scheme import Scheme, get_scheme, with_fitted
from mpq.models.dense import tensors_by_file


def _typed(kind: str, data: Any) -> dict[str, Any]:
    """An object as torchao's JSON has it."""
    return {"_type": kind, "_data": data}


_ROW = _typed("PerRow", {"dim": -1})
_SYMMETRIC = _typed("MappingType", "SYMMETRIC")
_AUTO = _typed("KernelPreference", "AUTO")
_E4M3, _INT4 = _typed("torch.dtype", "float8_e4m3fn"), _typed("torch.dtype", "int4")
_FAST = {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False}


def _groups(size: int) -> tuple[str, dict[str, Any]]:
    of = _typed("PerGroup", {"group_size": size})
    said = {"weight_dtype": _INT4, "granularity": of, "mapping_type": _SYMMETRIC}
    return "IntxWeightOnlyConfig", said


# the configuration of a module, which names what its weight is made by
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": (
        "Int8DynamicActivationInt8WeightConfig",
        {"granularity": _ROW, "act_mapping_type": _SYMMETRIC},
    ),
    "fp8_e4m3": (
        "Float8DynamicActivationFloat8WeightConfig",
        {"granularity": [_ROW, _ROW], "activation_dtype": _E4M3, "weight_dtype": _E4M3},
    ),
    "w8a16": ("Int8WeightOnlyConfig", {"granularity": _ROW}),
    "w4a16": _groups(128),
    "w4a16_g32": _groups(32),
}
HELD = with_fitted(*_CONFIGS)
_VERSION = 2  # of each of these configurations


def check_held(lowered: Mapping[str, str], base: str, model: Skeleton) -> None:
    """Raise MpqError for experts, and formats that torchao has no stable tensor for."""
    check_schemes(lowered, model, "a torchao checkpoint", HELD)


def sizes(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, int]:
    """Bytes of each part of a weight (C, K)."""
    scale = sizes_of(scheme, shape)["weight_scale"]
    found = {"_weight_qdata": shape[0] * shape[1], "_weight_scale": scale}
    if scheme.weights.by_blocks:  # a BF16 scale of each, and a byte of zeros
        found["_weight_zero_point"] = scale // 2
    return found


def laid_out(tensors: Mapping[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """The tensors of a weight (codes.py) as the parts of torchao's."""
    weights, scale = get_scheme(scheme).weights, tensors["weight_scale"]
    codes = tensors.get("weight")
    if codes is None:
        columns = int(tensors["weight_shape"][1])
        codes = _unpacked(tensors["weight_packed"], weights.bits)[:, :columns]
    found = {"_weight_qdata": codes, "_weight_scale": scale}
    if weights.by_blocks:
        found["_weight_zero_point"] = torch.zeros_like(scale, dtype=torch.int8)
    return found


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes in the words of codes.py, in INT8: lowest bits first, each above the most negative one."""
    codes = words.view(torch.uint8)
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    codes -= 2 ** (bits - 1)  # bytes wrap
    return codes.view(torch.int8)


def metadata(shards: tuple[Shard, ...], base: str) -> dict[str, str]:
    """What the header of each file says: of every tensor in the checkpoint, which class it is, and how it is to be made of its parts."""
    told: dict[str, Any] = {}
    for piece in (piece for shard in shards for piece in shard.pieces):
        told[piece.name] = {"_type": "Tensor"}
        if piece.format:
            scheme = get_scheme(piece.format)
            kind, attributes = _tensor(scheme, piece.shape[1], get_format(base).dtype)
            parts = [part.removeprefix("_weight_") for part in sizes(scheme, piece.shape)]
            told[piece.name] = {**_typed(kind, attributes), "_tensor_data_names": parts}
    names = {"tensor_names": json.dumps(list(told))}
    return {"format": "pt", **{name: json.dumps(of) for name, of in told.items()}, **names}


def _tensor(scheme: Scheme, columns: int, dtype: str) -> tuple[str, dict[str, Any]]:
    """The class of a weight and its attributes; a weight with K `columns`, of values in `dtype`."""
    weights, rounds = scheme.weights, scheme.activations is not None
    shared: dict[str, Any] = {"dtype": _typed("torch.dtype", dtype)}
    shared["block_size"] = [1, weights.block[1] or columns]
    if weights.kind == "float":
        how: dict[str, Any] = {"float8_dtype": _E4M3, "granularity": _ROW, "mm_config": None}
        how |= {"hp_value_lb": None, "hp_value_ub": None, "kernel_preference": _AUTO}
        activations = _typed("QuantizeTensorToFloat8Kwargs", how)
        matmul = _typed("Float8MMConfig", _FAST)
        more = {"mm_config": matmul, "act_quant_kwargs": activations, "kernel_preference": _AUTO}
        return "Float8Tensor", {**shared, **more}
    if weights.bits == 8:
        how = {"granularity": _ROW, "mapping_type": _SYMMETRIC, "reduce_range": False}
        of = _typed("QuantizeTensorToInt8Kwargs", how) if rounds else None
        return "Int8Tensor", {**shared, "act_quant_kwargs": of, "reduce_range": False}
    return "IntxUnpackedToInt8Tensor", {
        **shared,
        "target_dtype": _INT4,
        "activation_quantization": None,
    }


def section(lowered: Mapping[str, str], model: Skeleton) -> dict[str, Any]:
    """The `quantization_config` of config.json: TorchAoConfig with a configuration for each lowered module."""
    modules = {}
    for op, name in lowered.items():
        kind, said = _CONFIGS[name.removesuffix("_mse")]
        modules[op] = {**_typed(kind, said), "_version": _VERSION}
    each = {**_typed("FqnToConfig", {"fqn_to_config": modules}), "_version": 1}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": each},
        "modules_to_not_convert": [op for op in model.linears if op not in lowered],
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def differing(
    model: nn.Module,
    source: Path,
    names: Mapping[str, tuple[str, str]],
    formats: Mapping[str, str],
    base: str,
) -> list[str]:
    """What of a loaded model is not as the plan has it: each lowered linear's weight must be of its scheme's class, round
    activations where that does, and be read back by torchao as the values that the source's weight rounds to, bit for bit; each
    other one that weight itself. `names` says where it lies in the source: (file, tensor)."""
    dtype, files = getattr(torch, get_format(base).dtype), dict(tensors_by_file(source))
    wrong = [f"the file holds no {op}" for op in formats if op not in names]
    for op, (file, tensor) in names.items():
        want = files[file][tensor][...].to(dtype)
        weight: Any = model.get_submodule(op).get_parameter("weight")
        kind = type(weight.data).__name__
        if op in formats:
            scheme = get_scheme(formats[op])
            rounds = getattr(weight, "act_quant_kwargs", None) is not None
            if kind != _tensor(scheme, want.shape[1], "")[0] or rounds != bool(scheme.activations):
                wrong.append(f"{op} is a {kind}, not in {formats[op]}")
                continue
            want, weight = fake_quantize(want, scheme.weights, "row"), weight.dequantize()
        elif kind != "Tensor":
            wrong.append(f"{op} is a {kind}, not in {base}")
            continue
        if not torch.equal(weight.cpu(), want):
            wrong.append(f"the weight of {op} is another")
    return wrong


LAYOUT = Layout(
    section=section,
    reading="torchao",
    check_held=check_held,
    sizes=sizes,
    laid_out=laid_out,
    metadata=metadata,
    as_is=False,  # transformers alone reads it, and renames no parts of tensors
)
