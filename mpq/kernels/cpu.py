"""Native kernels of a CPU: FP32 and BF16 by casting, INT8 by oneDNN's prepacked quantized linear.

INT8 has one scale for each token and one for each output channel, as kernels/emulated.py rounds it. A call is three passes:

    rows (T, K) -> codes u8 (T, K), scale (T, 1)      compiled: amax, divide, round in one sweep over a row in cache
    codes x weight (K, C) -> y (T, C)                 oneDNN, the output channel's scale fused
    y * scale (+ bias)                                compiled

Codes are stored as round(x / scale) + 128 in u8, with a zero point of 128: the instructions multiply u8 by s8. Signed
codes give the same numbers from oneDNN's reference loop where there is no AMX (an AMD Zen 5: a thousand times slower).
oneDNN takes one scale for all tokens at most, hence the third pass. A scale per tensor would save it, and was found
1.1 times faster on BF16 activations (1.56 against 1.39 times BF16's speed at 576 x 1536, 1.85 against 1.77 at
2048 x 2048; 512 tokens, one thread), but one outlying token then costs all others their precision.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from mpq.formats import Format
from mpq.kernels.emulated import Linear, Product
from mpq.quantize import quantize, scale_of

log = logging.getLogger(__name__)

QuantizeRows: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
ScaleRows: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_TINY = torch.finfo(torch.float32).tiny
_ZERO_POINT = 128


def linear(weight: Tensor, bias: Tensor | None, fmt: Format, perturb_input: float = 1.0, perturb_weight: float = 1.0) -> Linear:
    """`x (..., K) -> (..., C)` computed in `fmt`, the output in x's dtype; `weight` (C, K) is converted once.

    `perturb_*` multiply the scales of INT8; the other formats have none.
    """
    if fmt.kind == "int":
        make = _onednn_linear if has_quantized_linear() else _int_mm_linear
        return make(weight.detach(), None if bias is None else bias.detach(), fmt, perturb_input, perturb_weight)
    dtype = getattr(torch, fmt.dtype)
    cast = weight.detach().to(dtype)
    cast_bias = None if bias is None else bias.detach().to(dtype)

    def forward(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.to(dtype), cast, cast_bias).to(x.dtype)

    return forward


def bgemm(fmt: Format) -> Product:
    """`a (..., T, K) x b (..., K, N)` computed in `fmt` (a float), the output in a's dtype."""
    dtype = getattr(torch, fmt.dtype)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a.to(dtype), b.to(dtype)).to(a.dtype)

    return product


@functools.cache
def has_quantized_linear() -> bool:
    """Whether oneDNN's quantized linear is there, on instructions that add u8 x s8 products without saturating (VNNI, AMX)."""
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    found = hasattr(torch.ops.onednn, "qlinear_pointwise") and hasattr(torch.ops.onednn, "qlinear_prepack")
    if found and any(features.get(f) for f in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return True
    log.warning("No oneDNN quantized linear for this CPU: INT8 runs on torch._int_mm, which is seldom faster than BF16.")
    return False


def _quantize_rows(rows: Tensor, perturb: Tensor) -> tuple[Tensor, Tensor]:
    values = rows.float()
    scale = values.abs().amax(-1, keepdim=True) / 127.0
    scale = torch.where(scale > _TINY, scale, 1.0) * perturb
    codes = (values / scale).round().clamp(-127, 127) + _ZERO_POINT
    return codes.to(torch.uint8), scale


def _scale_rows(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    scaled = y.float() * scale
    return (scaled if bias is None else scaled + bias).to(y.dtype)


@functools.cache
def _passes() -> tuple[QuantizeRows, ScaleRows]:
    """The passes around the product, compiled; uncompiled, some five times slower, where there is no C++ compiler."""
    compiled = torch.compile(_quantize_rows, dynamic=True), torch.compile(_scale_rows, dynamic=True)
    try:
        rows = torch.ones(2, 32)
        compiled[1](rows, compiled[0](rows, torch.ones(()))[1], None)
    except Exception as error:  # torch.compile raises whatever its back end met
        log.warning("INT8's activations are quantized uncompiled, and slowly: %s", str(error).splitlines()[0])
        return _quantize_rows, _scale_rows
    return compiled


def _onednn_linear(weight: Tensor, bias: Tensor | None, fmt: Format, perturb_input: float, perturb_weight: float) -> Linear:
    quantize_rows, scale_rows = _passes()
    scale = scale_of(weight, fmt, "row") * perturb_weight
    packed = torch.ops.onednn.qlinear_prepack(quantize(weight, fmt, scale).contiguous(), None)
    scale, zero = scale.flatten(), torch.zeros(weight.shape[0], dtype=torch.int32)
    perturb = torch.tensor(perturb_input)

    def forward(x: Tensor) -> Tensor:
        # contiguous: the compiled pass is made anew for each pattern of strides
        codes, row_scale = quantize_rows(x.reshape(-1, x.shape[-1]).contiguous(), perturb)
        dtype = x.dtype if x.dtype in (torch.float32, torch.bfloat16) else torch.float32  # those that oneDNN writes
        y = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, _ZERO_POINT, packed, scale, zero, None, 1.0, 0, dtype, "none", [], ""
        )  # fmt: skip
        return scale_rows(y, row_scale, bias).to(x.dtype).view(*x.shape[:-1], -1)

    return forward


def _int_mm_linear(weight: Tensor, bias: Tensor | None, fmt: Format, perturb_input: float, perturb_weight: float) -> Linear:
    scale = scale_of(weight, fmt, "row") * perturb_weight
    codes, scale = quantize(weight, fmt, scale).t(), scale.flatten()

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        row_scale = scale_of(rows, fmt, "row") * perturb_input
        product = torch._int_mm(quantize(rows, fmt, row_scale), codes).float() * row_scale * scale
        return (product if bias is None else product + bias).to(x.dtype).view(*x.shape[:-1], -1)

    return forward
