"""A weight as compressed-tensors keeps it: codes, packed where they have fewer than eight bits, and scales beside them.

The tensors' names and layouts are those of compressed-tensors 0.20 (compressors/*), which the tests read them back with:

    int-quantized, float-quantized   weight (C, K) in a byte each, weight_scale FP32: (C, 1), or one a block
    mxfp8-quantized                  weight E4M3, weight_scale E8M0 as its exponent + 127
    pack-quantized                   weight_packed int32 (C, K · bits / 32), lowest codes first; weight_scale; weight_shape
    nvfp4-, mxfp4-pack-quantized     weight_packed (C, K / 2), two E2M1 codes a byte, the first one low; weight_scale
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.formats.format import Format
from mpq.formats.quantize import blocks_of, from_blocks, quantize, scale_of, share_of
from mpq.formats.scheme import Scheme
from mpq.serving.schemes import stored_as

_CHUNK = 2**21  # elements rounded at a time: rounding takes several FP32 copies
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def sizes_of(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, int]:
    """Bytes of each tensor of a weight (C, K), by the end of its name."""
    rows, columns = shape
    stored, weights = stored_as(scheme), scheme.weights
    high, wide = weights.block
    blocks = math.ceil(rows / high) * (math.ceil(columns / wide) if wide else 1)
    scale = {"fp32": 4, "bf16": 2}.get(weights.scale, 1)
    if stored not in _PACKED:
        return {"weight": rows * columns, "weight_scale": blocks * scale}
    packed = -(-columns * weights.bits // 32) * 4 if stored == "pack-quantized" else columns // 2
    found = {"weight_packed": rows * packed, "weight_scale": blocks * scale}
    if stored == "pack-quantized":
        found["weight_shape"] = 16
    if weights.scale == "e4m3":
        found["weight_global_scale"] = 4
        found |= {} if scheme.activations is None else {"input_global_scale": 4}
    return found


def share_of_weight(weight: Any, fmt: Format, dtype: torch.dtype, name: str) -> float:
    """quantize.share_of a whole weight, read in chunks of rows."""
    if fmt.scale != "e4m3":
        return 1.0
    largest = torch.zeros(1)
    for part in _parts(weight, fmt, dtype, name):
        largest = torch.maximum(largest, part.abs().amax().float())
    return share_of(largest, fmt)


def tensors_of(
    weight: Any,
    scheme: Scheme,
    dtype: torch.dtype,
    name: str,
    share: float | None = None,
    input_share: float | None = None,
) -> dict[str, Tensor]:
    """The tensors of a weight (C, K) that is first cast to the base `dtype`, by the end of their names.

    The codes are formats.quantize's, in chunks of rows; `weight` is a tensor or safetensors' slice of one. `share` is what
    the tensor's blocks' scales are shares of, its own if left out, `input_share` that of its input. Raises MpqError where a
    value is not finite.
    """
    fmt, stored = scheme.weights, stored_as(scheme)
    share = share_of_weight(weight, fmt, dtype, name) if share is None else share
    pack = _PACKED.get(stored)
    codes, scales = [], []
    for part in _parts(weight, fmt, dtype, name):
        code, scale = _coded(part, fmt, share)
        codes.append(code if pack is None else pack(code, fmt.bits))
        scales.append(_stored_scale(scale, fmt, share))
    found = {"weight" if pack is None else "weight_packed": torch.cat(codes)}
    found["weight_scale"] = torch.cat(scales)
    if stored == "pack-quantized":
        rows, columns = _shape(weight)
        found["weight_shape"] = torch.tensor([rows, columns])
    if fmt.scale == "e4m3":
        found["weight_global_scale"] = torch.tensor([share])
        if input_share is not None:
            found["input_global_scale"] = torch.tensor([input_share])
    return found


def _coded(part: Tensor, fmt: Format, share: float) -> tuple[Tensor, Tensor]:
    if not fmt.by_blocks:
        scale = scale_of(part, fmt, "row")
        return quantize(part, fmt, scale), scale
    blocks = blocks_of(part, fmt)
    scale = scale_of(blocks, fmt, "row", share)
    return from_blocks(quantize(blocks, fmt, scale), fmt, part.shape), scale.squeeze(-1)


def _shape(weight: Any) -> tuple[int, int]:
    """(C, K) of a tensor, or of safetensors' slice of one."""
    rows, columns = weight.get_shape() if hasattr(weight, "get_shape") else weight.shape
    return rows, columns


def _parts(weight: Any, fmt: Format, dtype: torch.dtype, name: str) -> Iterator[Tensor]:
    rows, columns = _shape(weight)
    step = max(1, _CHUNK // columns)
    step += -step % fmt.block[0]  # whole blocks
    for at in range(0, rows, step):
        part = weight[at : at + step].to(dtype)
        if not torch.isfinite(part).all():
            raise MpqError(
                f"{name} holds a value that is not finite in {str(dtype).removeprefix('torch.')}: the checkpoint is damaged, or its base format too narrow."
            )
        yield part


def _stored_scale(scale: Tensor, fmt: Format, share: float) -> Tensor:
    if fmt.scale == "e8m0":
        return (torch.frexp(scale).exponent + 126).to(torch.uint8)
    if fmt.scale == "e4m3":
        return (scale * share).to(torch.float8_e4m3fn)
    return scale.bfloat16() if fmt.scale == "bf16" else scale


def _packed_e2m1(values: Tensor, bits: int) -> Tensor:
    """Two codes a byte, the first in the low half: the sign above the place among the magnitudes."""
    codes = torch.bucketize(values.abs(), _E2M1).to(torch.uint8)
    codes |= torch.signbit(values).to(torch.uint8) << 3
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _packed_integers(codes: Tensor, bits: int) -> Tensor:
    """As many codes as fit in an int32, the first in the lowest bits, each above the most negative one."""
    each = 32 // bits
    lifted = codes.to(torch.int64) + 2 ** (bits - 1)
    lifted = torch.nn.functional.pad(lifted, (0, -codes.shape[1] % each)).unflatten(-1, (-1, each))
    words = (lifted << (torch.arange(each) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


_PACKED = {
    "pack-quantized": _packed_integers,
    "nvfp4-pack-quantized": _packed_e2m1,
    "mxfp4-pack-quantized": _packed_e2m1,
}
