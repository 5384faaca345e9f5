"""A checkpoint's tensors as its model has them: what is stored quantized is read as the values that codes and scales stand for.

What is read, by the checkpoint's own word for it, and where its layout is told:

    fp8, mxfp8          weight, weight_scale_inv: a scale for the tensor or a block (arXiv 2412.19437, Sec. 3.3; OCP MX 1.0)
    fbgemm_fp8          weight, weight_scale: a scale a row (transformers, integrations/fbgemm_fp8.py)
    modelopt            FP8 as fbgemm_fp8, one scale, or one a block of 128 × 128 (4-D); MXFP8: E8M0 in bytes;
                        NVFP4: weight, weight_scale, weight_scale_2 (vLLM, modelopt.py)
    mxfp4               …_blocks, …_scales: gpt-oss's experts (transformers, integrations/mxfp4.py)
    compressed-tensors  by compressed-tensors' own decompressors
    gptq, awq           qweight, qzeros, scales, g_idx (AutoGPTQ's qlinear_cuda.py; AutoAWQ's packing_utils.py)

Everything is computed in FP32 and rounded once, to the base format. Activations' scales are left out: the model in base rounds none.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mpq.errors import MpqError, first_line, require
from mpq.models.layout import opened, read_config, weight_files
from mpq.models.quantized import already_quantized, is_narrow, method_of, section_of

Parts: TypeAlias = Mapping[str, Tensor]  # a weight's tensors by the ends of their names
Decode: TypeAlias = Callable[[Parts], Tensor]

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# scales of what flows through the model, the KV cache's among them
_OF_ACTIVATIONS = re.compile(
    r"[._](input|output|activation|[qkv])(_proj)?_(scale|scale_inv|zero_point|global_scale)$"
)
# ModelOpt's AWQ: inputs are multiplied by it, its weights are divided by it (modelopt, pre_quant_scale)
_OF_INPUTS = "pre_quant_scale"
# what its tensors add to a weight's name: the ends of codes, and those of which a quantized weight has some
_ENDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fp8": (("",), ("_scale_inv",)),
    "mxfp8": (("",), ("_scale_inv",)),
    "fbgemm_fp8": (("",), ("_scale",)),
    "modelopt": (("",), ("_scale", "_scale_2")),
    "mxfp4": (("_blocks",), ("_scales",)),
    "compressed-tensors": (
        ("_packed", ""),
        ("_scale", "_global_scale", "_zero_point", "_shape", "_g_idx"),
    ),
    "gptq": (("qweight",), ("qzeros", "scales", "g_idx")),
    "awq": (("qweight",), ("qzeros", "scales")),
}


@dataclass(frozen=True)
class Dense:
    """A weight that is read and decoded when it is asked for: `dense[...]`, as safetensors' slices are read."""

    parts: Mapping[str, Any]
    decode: Decode
    stored: str  # how its codes are stored, in people's words
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def __getitem__(self, where: Any) -> Tensor:
        values = self.decode({end: part[...] for end, part in self.parts.items()})
        return values.to(self.dtype)[where]

    def get_shape(self) -> list[int]:
        """The values' shape, as safetensors' slices say theirs."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """safetensors' word for a float's dtype."""
        return {torch.float32: "F32", torch.float16: "F16"}.get(self.dtype, "BF16")


def tensors_by_file(
    folder: Path, files: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each file of a checkpoint, and name → what `[...]` reads for its tensors, one file after the other; with `files` those alone.
    Raises MpqError for files and layouts that cannot be read."""
    wanted = [f for f in weight_files(folder) if not files or f.name in files]
    if not method_of(read_config(folder), folder):
        yield from ((file.name, _slices(file)) for file in wanted)
        return
    held = _dense(folder)  # a weight's scales may lie in another file
    for file in wanted:
        yield file.name, {name: part for name, (of, part) in held.items() if of == file.name}


def dense_tensors(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    only: Callable[[str], object] = lambda name: True,
) -> dict[str, Any]:
    """Name → what `[...]` reads as a tensor in the model's shape, for every tensor of a quantized checkpoint in `folder`: a
    decoded one in `dtype`, and as they are stored those whose names are not `only` meant.

    Raises MpqError for a layout that cannot be read, naming it.
    """
    return {name: part for name, (_, part) in _dense(folder, dtype, only).items()}


def _dense(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    only: Callable[[str], object] = lambda name: True,
) -> dict[str, tuple[str, Any]]:
    """Name → the file that holds it, or its codes, and what reads it. Raises MpqError for a layout that cannot be read."""
    config = read_config(folder)
    method, section = method_of(config, folder), section_of(config, folder)
    try:
        return _read(folder, method, section, dtype, only)
    except (MpqError, MemoryError):
        raise
    except Exception as error:  # whatever a mistyped value leads to
        why = f"{type(error).__name__}: {first_line(error)}"
        raise MpqError(
            f"What {folder} says of how its weights are quantized, by {method}, does not fit them ({why}): fetch the checkpoint again."
        ) from None


def _read(
    folder: Path,
    method: str,
    section: Mapping[str, Any],
    dtype: torch.dtype,
    only: Callable[[str], object],
) -> dict[str, tuple[str, Any]]:
    decoder = _decoders(folder, method, section)
    codes, beside = _ENDS[method]
    held = {key: (f.name, part) for f in weight_files(folder) for key, part in _slices(f).items()}
    if scaled := next((key for key in held if key.endswith(_OF_INPUTS)), ""):
        raise already_quantized(folder, f"for inputs that are scaled, as {scaled} tells")
    weights: dict[str, dict[str, str]] = defaultdict(dict)
    for key in filter(only, held):
        end = max((e for e in (*codes, *beside, "") if key.endswith(e)), key=len)
        weights[key.removesuffix(end)][end] = key
    found: dict[str, tuple[str, Any]] = {key: of for key, of in held.items() if not only(key)}
    for weight, ends in weights.items():
        of_codes = next((ends[end] for end in codes if end in ends), "")
        if of_codes and any(end in ends for end in beside):
            name = f"{weight}weight" if codes == ("qweight",) else weight
            of_weight = decoder(name, {end: held[key][1] for end, key in ends.items()})
            found[name] = (held[of_codes][0], replace(of_weight, dtype=dtype))
        else:
            found |= {k: held[k] for k in ends.values() if not _OF_ACTIVATIONS.search(k)}
    for key, (_, part) in found.items():
        if only(key) and not isinstance(part, Dense) and is_narrow(part):
            raise already_quantized(folder, f"{key} is stored as {part.get_dtype()}")
    return found


def _slices(file: Path) -> dict[str, Any]:
    tensors = opened(file)
    return {key: tensors.get_slice(key) for key in sorted(tensors.keys())}


def _decoders(
    folder: Path, method: str, section: Mapping[str, Any]
) -> Callable[[str, Mapping[str, Any]], Dense]:
    """What makes a weight of its name and its parts."""
    if method == "compressed-tensors":
        return _CompressedTensors(folder, section)
    bits = int(section.get("bits") or 0)
    if method in ("gptq", "awq") and bits not in ((2, 4, 8) if method == "gptq" else (4,)):
        raise already_quantized(folder, f"by {method.upper()} with {bits} bits")
    if method == "awq" and section.get("version", "gemm") != "gemm":
        raise already_quantized(folder, f"by AWQ as {section['version']}")
    first = 0 if section.get("checkpoint_format") == "gptq_v2" else 1
    ways: dict[str, Decode] = {"mxfp4": _mxfp4, "awq": _awq}
    ways["gptq"] = partial(_gptq, bits=bits, first=first)
    decode = ways.get(method) or partial(_scaled, block=section.get("weight_block_size"))
    stored = {"mxfp4": "mxfp4", "gptq": f"int{bits}", "awq": "int4"}

    def made(name: str, parts: Mapping[str, Any]) -> Dense:
        kind = str(parts[""].get_dtype()) if "" in parts else ""
        if kind and kind != "F8_E4M3" and not ("_scale_2" in parts and kind == "U8"):
            raise already_quantized(folder, f"{name} is stored as {kind}")
        if kind and kind != "U8":
            _check_scale(folder, name, parts, _block_of(parts, section.get("weight_block_size")))
        how = stored.get(method) or ("nvfp4" if kind == "U8" else "fp8_e4m3")
        return Dense(parts, decode, how, _shape(method, parts, bits))

    return made


def _shape(method: str, parts: Mapping[str, Any], bits: int) -> tuple[int, ...]:
    """That of the values; of packed ones there are several in an element."""
    if method in ("gptq", "awq"):
        inputs, outputs = parts["qweight"].get_shape()
        return (outputs, inputs * 32 // bits) if method == "gptq" else (outputs * 8, inputs)
    if method == "mxfp4":
        experts, outputs, blocks, _ = parts["_blocks"].get_shape()
        return experts, blocks * 32, outputs
    if "_shape" in parts:
        return tuple(parts["_shape"][...].tolist())
    codes = parts["_packed"] if "_packed" in parts else parts[""]
    *lead, columns = codes.get_shape()
    return (*lead, 2 * columns if codes.get_dtype() == "U8" else columns)


def _check_scale(
    folder: Path, name: str, parts: Mapping[str, Any], block: tuple[int, int] | None
) -> None:
    """Raise MpqError where a weight's scales are neither one, nor one a row, nor one a block."""
    scale = parts["_scale_inv" if "_scale_inv" in parts else "_scale"].get_shape()
    scale = [scale[0], scale[2]] if _of_squares(scale) else scale
    *lead, rows, columns = parts[""].get_shape()
    blocks = [*lead, -(-rows // block[0]), -(-columns // block[1])] if block else []
    # a shape, not a count: as many blocks as rows would fit, too
    of_rows = block is None and scale in ([*lead, rows], [*lead, rows, 1])
    if math.prod(scale) != 1 and scale != blocks and not of_rows:
        raise already_quantized(folder, f"{name} {[*lead, rows, columns]} with scales {scale}")


def _of_squares(shape: Collection[int]) -> bool:
    """Whether scales are ModelOpt's of blocks of 128 × 128: (C / 128, 1, K / 128, 1)."""
    return len(shape) == 4 and list(shape)[1::2] == [1, 1]


def _block_of(parts: Mapping[str, Any], block: tuple[int, int] | None) -> tuple[int, int] | None:
    """What shares a scale, where the checkpoint's own word or ModelOpt's layout tells it."""
    scale = parts.get("_scale")
    if block or scale is None:
        return block
    shape = list(scale.get_shape() if hasattr(scale, "get_shape") else scale.shape)
    if _of_squares(shape):
        return 128, 128
    narrow = (
        scale.get_dtype() == "U8" if hasattr(scale, "get_dtype") else scale.dtype == torch.uint8
    )
    return (1, 32) if narrow and len(shape) > 1 and shape[-1] > 1 else None


def _scaled(parts: Parts, block: tuple[int, int] | None = None) -> Tensor:
    """Codes times their scale: one for the tensor, one a row, or one a block; NVFP4's blocks' scales times the tensor's."""
    codes = parts[""]
    scale = _values(parts["_scale_inv"] if "_scale_inv" in parts else parts["_scale"])
    if "_scale_2" in parts and codes.dtype == torch.uint8:
        values = _unpacked_e2m1(codes)
        return values * scale.repeat_interleave(16, -1) * parts["_scale_2"].float()
    values = codes.float()
    rows, columns = values.shape[-2:]
    block = _block_of(parts, block)
    scale = scale[:, 0, :, 0] if _of_squares(scale.shape) else scale
    if scale.numel() == 1:
        return values * scale.reshape(())
    if block is None:  # a scale a row
        return values * scale.reshape(*values.shape[:-1], 1)
    high, wide = block
    of_rows = scale.repeat_interleave(high, -2)[..., :rows, :]
    return values * of_rows.repeat_interleave(wide, -1)[..., :columns]


def _values(scale: Tensor) -> Tensor:
    """Scales in FP32: bytes are exponents, + 127 (OCP MX 1.0: E8M0)."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def _unpacked_e2m1(codes: Tensor) -> Tensor:
    """Two values of each byte, the low half's first."""
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    values: Tensor = _E2M1[both & 7] * (1 - 2 * (both >> 3)).float()
    return values


def _mxfp4(parts: Parts) -> Tensor:
    """gpt-oss's experts: blocks (experts, C, K / 32, 16), scales (experts, C, K / 32), to (experts, K, C)."""
    scale = _values(parts["_scales"])[..., None]
    return (_unpacked_e2m1(parts["_blocks"]) * scale).flatten(-2).mT.contiguous()


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """(R, W) words of 32 bits to (R, W · 32 / bits) codes, the lowest bits first."""
    shifts = torch.arange(0, 32, bits)
    codes: Tensor = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2)


def _gptq(parts: Parts, bits: int, first: int) -> Tensor:
    """qweight (K · bits / 32, C), qzeros (groups, C · bits / 32), scales (groups, C); zeros are stored less `first`."""
    codes = _unpacked(parts["qweight"].T, bits)  # (C, K)
    scales = parts["scales"].float()
    zeros = _unpacked(parts["qzeros"], bits) + first if "qzeros" in parts else 2 ** (bits - 1)
    width = codes.shape[1]
    groups = parts.get("g_idx", torch.arange(width) // (width // len(scales))).long()
    less: Tensor = codes.T - (zeros[groups] if isinstance(zeros, Tensor) else zeros)
    return (less * scales[groups]).T.contiguous()


_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where a word's columns lie in it


def _awq(parts: Parts) -> Tensor:
    """qweight (K, C / 8), qzeros (groups, C / 8), scales (groups, C)."""

    def columns(words: Tensor) -> Tensor:
        ordered: Tensor = _unpacked(words, 4).unflatten(-1, (-1, 8))[..., _AWQ_ORDER]
        return ordered.flatten(-2)

    scales = parts["scales"].float()
    each = len(parts["qweight"]) // len(scales)
    zeros, scales = (t.repeat_interleave(each, 0) for t in (columns(parts["qzeros"]), scales))
    values: Tensor = (columns(parts["qweight"]) - zeros) * scales
    return values.T.contiguous()


# what people call the floats that compressed-tensors has a name for
_FLOATS = {
    "float-quantized": "fp8_e4m3",
    "mxfp8-quantized": "mxfp8",
    "mxfp4-pack-quantized": "mxfp4",
    "nvfp4-pack-quantized": "nvfp4",
}


class _CompressedTensors:
    """compressed-tensors' weights, each by the group that its module is a target of."""

    def __init__(self, folder: Path, section: Mapping[str, Any]) -> None:
        require("compressed_tensors", "a checkpoint in compressed-tensors' format")
        from compressed_tensors.quantization import QuantizationConfig

        self.folder = folder
        sparse = (section.get("sparsity_config") or {}).get("format") or "dense"
        if sparse != "dense" or section.get("transform_config"):
            how = "with rotated weights" if sparse == "dense" else f"sparse as {sparse}"
            raise already_quantized(folder, f"by compressed-tensors {how}")
        try:
            known = {k: v for k, v in section.items() if k in QuantizationConfig.model_fields}
            config = QuantizationConfig.model_validate(known)
        except Exception as error:  # pydantic's own
            raise MpqError(
                f"{folder / 'config.json'} has a quantization_config that compressed-tensors cannot read ({first_line(error)}): fetch the checkpoint again."
            ) from None
        self.schemes = list(config.config_groups.values())
        for scheme in self.schemes:
            scheme.format = scheme.format or config.format

    def __call__(self, name: str, parts: Mapping[str, Any]) -> Dense:
        from compressed_tensors.compressors import BaseCompressor

        scheme = self._scheme(name.removesuffix(".weight"))
        how = str(getattr(scheme.format, "value", scheme.format))
        try:
            compressor = BaseCompressor.get_value_from_registry(how)
            compressor.compression_param_names(scheme)
        except Exception:  # no such name, or one of its older kind
            raise already_quantized(self.folder, f"by compressed-tensors as {how}") from None

        def decode(parts: Parts) -> Tensor:
            of = {f"weight{end}": tensor for end, tensor in parts.items()}
            if of["weight_scale"].dtype in (torch.bfloat16, torch.float16):
                of["weight_scale"] = of["weight_scale"].float()  # the product is rounded once
            weight: Tensor = compressor.decompress(of, scheme)["weight"]
            return weight

        number = f"{scheme.weights.type}{scheme.weights.num_bits}"
        return Dense(parts, decode, _FLOATS.get(how, number), _shape("", parts, 0))

    def _scheme(self, module: str) -> Any:
        from compressed_tensors.utils.match import match_name

        for scheme in self.schemes:
            if any(match_name(module, target) for target in scheme.targets):
                return scheme
        classes = [s for s in self.schemes if any(t.isidentifier() for t in s.targets)]
        if len(classes) == 1:
            return classes[0]
        raise already_quantized(
            self.folder, f"by compressed-tensors, whose groups do not say how {module} is stored"
        )
