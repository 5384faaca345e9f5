"""Operands with a scale for each block of a row, laid out as scaled products take them: activations in one Triton pass, weights by torch.

    x (T, K) -> codes (T, K up to whole blocks), or (T, that / 2) bytes of two E2M1 codes, the first in the low bits
             -> scales, FP32 (K / 128, T), or in E8M0 or E4M3 swizzled for the tensor cores

Swizzled (cuBLAS documentation, "1D block scaling factors layout"; torch's SWIZZLE_32_4_4), 128 rows by 4 blocks are
512 bytes, [row % 32][row / 32 % 4][block % 4], and tiles lie in the order of rows, then blocks. Rows and blocks that fill
a tile up are zero.

Codes and scales are those of formats/quantize.py, bit for bit: x is divided by its scale, not multiplied by 1 / scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpq.formats.format import Format
from mpq.formats.quantize import blocks_of, quantize, scale_of, share_of
from mpq.kernels.fp8 import DTYPES, cast

WHOLE = 32  # columns of a tensor core's step: rows are filled up to it, or to their own block's
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_SCALES = {"fp32": torch.float32, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Operand:
    """Codes and scales. What `perturb` multiplied is in FP32 scales; those of E4M3 are multiplied by `whole` besides, an FP32
    number on their device that has it, those of E8M0 by `perturb` itself."""

    codes: Tensor
    scales: Tensor
    whole: Tensor | None = None
    perturb: float = 1.0


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _share(largest):
    """quantize.share_of E2M1 in E4M3 scales: the power of two at or below 2688 / largest = 1.3125 · 2^11 / largest."""
    exponent = (_bits(largest) >> 23) - 127
    power = 11 - exponent - ((_bits(largest) & 0x7FFFFF) > 0x280000).to(tl.int32)
    share = ((tl.minimum(power, 127) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where((largest > _TINY) & (largest < float("inf")), share, 1.0)


@triton.jit
def _e2m1(x):
    """The code of x, |x| ≤ 6: ties go to the even code."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.uint8) + (size >= 0.75).to(tl.uint8) + (size > 1.25).to(tl.uint8)
    code += (size >= 1.75).to(tl.uint8) + (size > 2.5).to(tl.uint8) + (size >= 3.5).to(tl.uint8)
    code += (size > 5.0).to(tl.uint8)
    return code | ((_bits(x) >> 28) & 8).to(tl.uint8)


@triton.jit
def _blocks_kernel(
    x,
    codes,
    scales,
    largest_of_all,
    whole,
    rows,
    width,
    blocks,
    tiles,
    maximum,
    top,
    of_maximum,
    perturb,
    SCALE: tl.constexpr,
    PAIRS: tl.constexpr,
    DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    COUNT: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    row, block = number // blocks, number % blocks
    there = row < rows
    column = block[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = there[:, None] & (column < width)
    values = tl.load(x + row[:, None] * width + column, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    if SCALE == "e8m0":
        power = ((_bits(largest) + 0x00200000) >> 23) - of_maximum
        stored = tl.where(largest > _TINY, tl.minimum(tl.maximum(power, 1), 254), 127)
        scale = (stored << 23).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        share = _share(tl.load(largest_of_all))
        of_block = tl.minimum(tl.div_rn(largest, top) * share, 448.0)
        rounded = cast(of_block, tl.float8e4nv).to(tl.float32)
        rounded = tl.where(rounded > 0, rounded, 0.125)
        scale = rounded / share  # exact: a power of two
        stored = cast(rounded, tl.float8e4nv).to(tl.uint8, bitcast=True)
        if tl.program_id(0) == 0:
            tl.store(whole, perturb / share)
    else:
        scale = tl.div_rn(largest, top)
        scale = tl.where(scale > _TINY, scale, 1.0)
    if SCALE == "fp32":
        tl.store(scales + block * rows + row, scale * perturb, mask=there)
    else:
        tile = (row // 128 * tiles + block // 4) * 512
        place = tile + row % 32 * 16 + row // 32 % 4 * 4 + block % 4
        tl.store(scales + place, stored.to(tl.uint8), mask=there)
    scale *= perturb
    values = tl.div_rn(values, tl.broadcast_to(scale[:, None], [COUNT, COLUMNS]))
    values = tl.minimum(tl.maximum(values, -maximum), maximum)
    if PAIRS:
        low, high = tl.split(tl.reshape(_e2m1(values), [COUNT, COLUMNS // 2, 2]))
        byte = block[:, None] * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
        at = codes + row[:, None] * (blocks * (COLUMNS // 2)) + byte
        tl.store(at, low | (high << 4), mask=there[:, None])
    else:
        at = codes + row[:, None] * (blocks * COLUMNS) + column
        tl.store(at, cast(values, DTYPE), mask=there[:, None])


def is_pairs(fmt: Format) -> bool:
    """Whether two codes share a byte."""
    return fmt.bits == 4


def _blocks(width: int, columns: int) -> int:
    """Blocks of a row, with those that fill it up."""
    unit = max(WHOLE, columns)
    return math.ceil(width / unit) * unit // columns


def quantize_blocks(x: Tensor, fmt: Format, perturb: float = 1.0) -> Operand:
    """The operand of x (T, K) in blocks of one row, whose scales `perturb` multiplies."""
    x = x.contiguous()
    (rows, width), columns = x.shape, fmt.block[1]
    blocks, tiles = _blocks(width, columns), math.ceil(_blocks(width, columns) / 4)
    pairs, new = is_pairs(fmt), x.new_empty
    bytes_ = blocks * columns // (2 if pairs else 1)
    codes = new(rows, bytes_, dtype=torch.uint8 if pairs else getattr(torch, fmt.dtype))
    whole = new(1, dtype=torch.float32)
    if fmt.scale == "fp32":
        scales = new(blocks, rows, dtype=torch.float32)
    else:
        scales = x.new_zeros(math.ceil(rows / 128) * tiles * 512, dtype=torch.uint8)
    largest = whole
    if fmt.scale == "e4m3" and x.numel():
        largest = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    count = max(1, 2048 // columns)
    if rows:
        _blocks_kernel[(triton.cdiv(rows * blocks, count),)](
            x,
            codes,
            scales,
            largest,
            whole,
            rows,
            width,
            blocks,
            tiles,
            fmt.maximum,
            fmt.top,
            math.frexp(fmt.maximum)[1] - 1,
            perturb,
            SCALE=fmt.scale,
            PAIRS=pairs,
            DTYPE=tl.uint8 if pairs else DTYPES[codes.dtype],
            COLUMNS=columns,
            COUNT=count,
            num_warps=4,
        )
    codes = codes.view(torch.float4_e2m1fn_x2) if pairs else codes
    return Operand(codes, scales.view(_SCALES[fmt.scale]), whole, perturb)


def weights_in_blocks(
    weight: Tensor, fmt: Format, perturb: float = 1.0, multiple: int = 1
) -> Operand:
    """The operand of a weight (C, K), C filled up to a multiple of `multiple`. Scales of blocks of several rows are
    (C up / rows, K / columns) FP32."""
    weight = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % multiple))
    high, columns = fmt.block
    blocks = _blocks(weight.shape[1], columns)
    weight = torch.nn.functional.pad(weight, (0, blocks * columns - weight.shape[1]))
    parts, share = blocks_of(weight, fmt), share_of(weight, fmt)
    scale = scale_of(parts, fmt, "row", share)
    values = quantize(parts, fmt, scale * perturb)
    if high > 1:
        values = values.unflatten(-1, (high, columns)).transpose(-3, -2).flatten(-4, -3)
        values = values[: len(weight)]
    codes, scale = values.flatten(-2), scale.squeeze(-1)
    whole = torch.full((1,), perturb / share, dtype=torch.float32, device=weight.device)
    if is_pairs(fmt):
        codes = packed(codes)
    if fmt.scale == "fp32":
        return Operand(codes.contiguous(), (scale * perturb).contiguous())
    stored = (scale * share).to(_SCALES[fmt.scale]).view(torch.uint8)
    return Operand(codes, swizzled(stored).view(_SCALES[fmt.scale]), whole, perturb)


def packed(values: Tensor) -> Tensor:
    """E2M1 values (C, K) as bytes of two codes, (C, K / 2), the first in the low bits."""
    size = values.abs()
    code = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4))
    code = code.to(torch.uint8) | (values.signbit().to(torch.uint8) << 3)
    return (code[:, ::2] | (code[:, 1::2] << 4)).view(torch.float4_e2m1fn_x2)


def swizzled(scales: Tensor) -> Tensor:
    """Scales (C, K / columns), bytes, in the layout above."""
    rows, blocks = scales.shape
    scales = torch.nn.functional.pad(scales, (0, -blocks % 4, 0, -rows % 128))
    tiles = scales.view(-1, 4, 32, scales.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).flatten().contiguous()
