"""Linears of a GPU whose operands are integers or blocks: codes of activations at every call, a product that knows the scales.

    INT8                a scale for each token and channel      our product, in Triton (bgemm.py)
    FP8 blocks          1 x 128 by 128 x 128                    the same; torch has one for Hopper alone
    MXFP8, MXFP4        1 x 32, powers of two                   torch.nn.functional.scaled_mm, from Blackwell on
    NVFP4               1 x 16, E4M3, one for the tensor        the same

What is left of the scales, NVFP4's of the whole tensors and what `perturb_*` multiply, is one number: the product's own factor
in NVFP4, and multiplied into the output in MX.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from mpq.errors import MpqError, first_line
from mpq.formats.format import BLOCKED, FORMATS, Format
from mpq.formats.quantize import quantize, scale_of
from mpq.kernels import bgemm
from mpq.kernels.block_codes import Operand, quantize_blocks, weights_in_blocks
from mpq.kernels.cpu import LastInput
from mpq.kernels.emulated import Linear
from mpq.kernels.fp8 import quantize_rows

MULTIPLE = 16  # of C, asked for by torch's scaled products
_last = LastInput()


def linear(
    weight: Tensor, bias: Tensor | None, fmt: Format, perturb_input: float, perturb_weight: float
) -> Linear:
    """`x (..., K) -> (..., C)` computed in INT8 or in blocks; `weight` (C, K) is converted once. What is returned takes the
    output's dtype as a second argument, x's if left out. `perturb_*` multiply the scales."""
    weight, channels = weight.detach(), len(weight)
    read = activations_beside(fmt)
    if not fmt.by_blocks:
        padded = nn.functional.pad(weight, (0, -weight.shape[1] % bgemm.PADDING))
        scale = scale_of(padded, fmt, "row") * perturb_weight
        held = Operand(quantize(padded, fmt, scale), scale.flatten())
    else:
        held = weights_in_blocks(weight, fmt, perturb_weight, MULTIPLE if fmt.block[0] == 1 else 1)

    def forward(x: Tensor, out: torch.dtype | None = None) -> Tensor:
        out, rows = out or x.dtype, x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():
            of = (held.codes, held.scales, held.whole, held.perturb)
            y: Tensor = _linear_op(rows, *of, read.name, perturb_input, out)
        else:
            how = (read.name, perturb_input)
            y = product(
                _last.get(x, how, lambda: operand(rows, read, perturb_input)), held, read, out
            )
        y = y[:, :channels]
        y = y if bias is None else y + bias.detach()
        return y.to(out).reshape(*x.shape[:-1], channels)

    return forward


def _linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    whole: Tensor | None,
    perturb: float,
    fmt: str,
    perturb_input: float,
    dtype: torch.dtype,
) -> Tensor:
    read = (FORMATS | BLOCKED)[fmt]
    return product(
        operand(x, read, perturb_input), Operand(codes, scales, whole, perturb), read, dtype
    )


# one operation to torch.compile, which would otherwise look into the launches
_linear_op = torch.library.custom_op("mpq::scaled_linear", _linear, mutates_args=())


@_linear_op.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    whole: Tensor | None,
    perturb: float,
    fmt: str,
    perturb_input: float,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(len(x), len(codes), dtype=dtype)


def activations_beside(fmt: Format) -> Format:
    """What activations are stored in beside weights in `fmt`."""
    if fmt.block[0] > 1:
        return BLOCKED["fp8_e4m3_128"]
    return fmt if fmt.fit == "max" else replace(fmt, name=fmt.name.removesuffix("_mse"), fit="max")


def operand(x: Tensor, fmt: Format, perturb: float) -> Operand:
    """The activations x (T, K), quantized."""
    if fmt.by_blocks:
        return quantize_blocks(x, fmt, perturb)
    codes, scales = quantize_rows(x, fmt, bgemm.PADDING, perturb)
    return Operand(codes, scales)


def product(a: Operand, b: Operand, fmt: Format, dtype: torch.dtype) -> Tensor:
    """(T, C up) in `dtype` of activations in `fmt` and the weights beside them."""
    if fmt.scale == "fp32":
        return bgemm.linear((a.codes, a.scales), (b.codes, b.scales), dtype, fmt.by_blocks)
    return scaled(a, b, fmt).to(dtype)


def scaled(a: Operand, b: Operand, fmt: Format) -> Tensor:
    """The same by torch's scaled product, in BF16. Raises MpqError where this torch, or the GPU, has none."""
    swizzle = SwizzleType.SWIZZLE_32_4_4
    try:
        if a.whole is not None and b.whole is not None and fmt.scale == "e4m3":
            recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
            how = [swizzle, SwizzleType.NO_SWIZZLE]
            scales = [a.scales, a.whole], [b.scales, b.whole]
            return scaled_mm(a.codes, b.codes.t(), scales[0], recipe, scales[1], recipe, how, how)
        one = ScalingType.BlockWise1x32
        y = scaled_mm(a.codes, b.codes.t(), a.scales, one, b.scales, one, swizzle, swizzle)
    except NotImplementedError as error:
        raise MpqError(
            f"torch {torch.__version__} has no product in {fmt.name} on this device ({first_line(error)}): "
            "leave it out of the objectives that are timed, or emulate the plan."
        ) from None
    factor = a.perturb * b.perturb
    return y if factor == 1 else y * factor
