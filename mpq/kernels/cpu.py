"""Native kernels of a CPU: FP32 and BF16 by casting, INT8 by oneDNN's prepacked quantized linear or by ours.

INT8 has one scale for each token and one for each output channel, as kernels/emulated.py rounds it. A call is three passes:

    rows (T, K) -> codes u8 (T, K), scale (T, 1)      amax, divide, round in one sweep over a row in cache (rows.cpp)
    codes x weight (K, C) -> y (T, C)                 oneDNN, the output channel's scale fused
    y * scale (+ bias)                                in place (rows.cpp)

Codes are stored as round(x / scale) + 128 in u8, with a zero point of 128: the instructions multiply u8 by s8. Signed
codes give the same numbers from oneDNN's reference loop where there is no AMX (an AMD Zen 5: a thousand times slower).
oneDNN takes one scale for all tokens at most, hence the third pass. A scale per tensor would save it, but one outlying
token then costs all others their precision (bench/kernels.py measures both).

Without VNNI those instructions saturate; there int8_linear.py multiplies codes in 16 bits, on AVX2. And where BF16 has no instructions,
oneDNN multiplies it element by element: FP32's product of the rounded operands is the same sum, and five to ten times as fast.

Between neighbours in 16 bits inside an FP32 model nothing is cast: a linear may be asked to leave its output in BF16, or to
return to FP32 (apply.Mixed knows who reads it).

Linears that read the same activations (q, k and v; gate and up) share their cast or their codes: a gain that only a
group measured together shows.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from mpq.formats.format import Format
from mpq.formats.quantize import quantize, scale_of
from mpq.kernels import int8_attention, int8_linear, rows
from mpq.kernels.compiler import features
from mpq.kernels.emulated import Linear, Product

log = logging.getLogger(__name__)

Made = TypeVar("Made")
_FAST = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
}  # what oneDNN writes, and the passes read


class LastInput:
    """What was made of the last activations, for the next linear that reads the same tensor.

    The tensor is held weakly, what was made of it until the next one comes: at most one activation's memory. A tensor
    changed in place counts as another one, except in inference mode, where tensors count no versions: there no module may
    write into the activations between two linears that read them, and none of transformers' models does.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self, x: Tensor, how: object, make: Callable[[], Made]) -> Made:
        """`make()`, or what it gave for this very tensor the last time."""
        version = None if x.is_inference() else x._version
        last = getattr(self._local, "last", None)
        if last is not None and last[0]() is x and last[1:3] == (how, version):
            return last[3]  # type: ignore[no-any-return]
        made = make()
        self._local.last = (weakref.ref(x), how, version, made)
        return made


_last = LastInput()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def linear(
    weight: Tensor,
    bias: Tensor | None,
    fmt: Format,
    perturb_input: float = 1.0,
    perturb_weight: float = 1.0,
) -> Linear:
    """`x (..., K) -> (..., C)` computed in `fmt`; `weight` (C, K) is converted once. What is returned takes the output's dtype
    as a second argument, x's if left out.

    `perturb_*` multiply the scales of INT8; the other formats have none.
    """
    if fmt.kind == "int":
        make = (
            _onednn_linear
            if has_quantized_linear()
            else _avx2_linear
            if int8_linear.available()
            else _int_mm_linear
        )
        return make(
            weight.detach(),
            None if bias is None else bias.detach(),
            fmt,
            perturb_input,
            perturb_weight,
        )
    dtype = getattr(torch, fmt.dtype)
    computed = _computed_in(dtype, weight.device.type)
    cast = weight.detach().to(dtype).to(computed)
    cast_bias = None if bias is None else bias.detach().to(dtype).to(computed)

    def forward(x: Tensor, out: torch.dtype | None = None) -> Tensor:
        compiling = (
            torch.compiler.is_compiling()
        )  # then inductor shares casts, and fuses them with what surrounds them
        if compiling or x.dtype == computed == dtype:
            lowered = x.to(dtype).to(computed)
        else:
            lowered = _last.get(x, dtype, lambda: x.to(dtype).to(computed))
        return torch.nn.functional.linear(lowered, cast, cast_bias).to(out or x.dtype)

    return forward


def bgemm(fmt: Format) -> Product:
    """`a (..., T, K) x b (..., K, N)` computed in `fmt`, the output in a's dtype."""
    if fmt.kind == "int":
        return int8_attention.bgemm
    dtype = getattr(torch, fmt.dtype)
    computed = _computed_in(dtype, "cpu")

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a.to(dtype).to(computed), b.to(dtype).to(computed)).to(a.dtype)

    return product


@functools.cache
def _computed_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """In what to multiply operands rounded to `dtype`: itself, but for BF16 on an x86 CPU for which oneDNN has no fast path.

    kernels/cuda.py comes here too with its 16-bit linears, and a GPU's host decides nothing.
    """
    has = features() if device == "cpu" else {}
    without = has.get("architecture") == "x86_64" and not (
        has.get("avx512_f") or has.get("avx_ne_convert")
    )
    return torch.float32 if dtype == torch.bfloat16 and without else dtype


@functools.cache
def has_quantized_linear() -> bool:
    """Whether oneDNN's quantized linear is there, on instructions that add u8 x s8 products without saturating (VNNI, AMX)."""
    found = hasattr(torch.ops.onednn, "qlinear_pointwise") and hasattr(
        torch.ops.onednn, "qlinear_prepack"
    )
    return found and any(features().get(f) for f in ("avx512_vnni", "avx_vnni", "amx_int8"))


def _onednn_product(
    codes: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
        codes, 1.0, rows.ZERO_POINT, packed, scale, zero, None, 1.0, 0, dtype, "none", [], ""
    )


# inductor's own lowering of oneDNN's operator wants the weight to be a constant of the graph, which would compile every block anew
_product = torch.library.custom_op("mpq::int8_product", _onednn_product, mutates_args=())


@_product.register_fake
def _(codes: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((codes.shape[0], scale.shape[0]), dtype=dtype)


def _onednn_linear(
    weight: Tensor, bias: Tensor | None, fmt: Format, perturb_input: float, perturb_weight: float
) -> Linear:
    scale = scale_of(weight, fmt, "row") * perturb_weight
    packed = torch.ops.onednn.qlinear_prepack(quantize(weight, fmt, scale).contiguous(), None)
    scale, zero = scale.flatten(), torch.zeros(weight.shape[0], dtype=torch.int32)
    bias = None if bias is None else bias.float().contiguous()

    def forward(x: Tensor, out: torch.dtype | None = None) -> Tensor:
        read, wanted = _FAST.get(x.dtype, torch.float32), out or x.dtype
        written = _FAST.get(wanted, torch.float32)
        compiling = torch.compiler.is_compiling()
        if compiling:
            codes, row_scale = rows.TorchPasses().quantize(_rows(x), perturb_input)
        else:
            codes, row_scale = _last.get(
                x, perturb_input, lambda: rows.passes().quantize(_rows(x).to(read), perturb_input)
            )
        y = (_product if compiling else _onednn_product)(codes, packed, scale, zero, written)
        passes = rows.TorchPasses() if compiling else rows.passes()
        return passes.rescale(y, row_scale, bias).to(wanted).view(*x.shape[:-1], scale.shape[0])

    return forward


def _avx2_linear(
    weight: Tensor, bias: Tensor | None, fmt: Format, perturb_input: float, perturb_weight: float
) -> Linear:
    scale = scale_of(weight, fmt, "row") * perturb_weight
    packed = int8_linear.pack(quantize(weight, fmt, scale), scale.flatten(), bias)

    def forward(x: Tensor, out: torch.dtype | None = None) -> Tensor:
        read, wanted = _FAST.get(x.dtype, torch.float32), out or x.dtype

        def codes_of_rows() -> tuple[Tensor, Tensor]:
            return int8_linear.quantize(_rows(x).to(read), perturb_input)

        codes, row_scale = (
            codes_of_rows()
            if torch.compiler.is_compiling()
            else _last.get(x, perturb_input, codes_of_rows)
        )
        y = int8_linear.product(codes, row_scale, packed, _FAST.get(wanted, torch.float32))
        return y.to(wanted).view(*x.shape[:-1], packed.scale.shape[0])

    return forward


@functools.cache
def _say_slow() -> None:
    log.warning(
        "No fast INT8 linear for this CPU, or no C++17 compiler: INT8 runs on torch._int_mm, which may be far slower than FP32. With AVX2, "
        "install g++ 9 or clang 5 or newer."
    )


def _int_mm_linear(
    weight: Tensor, bias: Tensor | None, fmt: Format, perturb_input: float, perturb_weight: float
) -> Linear:
    _say_slow()
    scale = scale_of(weight, fmt, "row") * perturb_weight
    codes, scale = quantize(weight, fmt, scale).t(), scale.flatten()

    def forward(x: Tensor, out: torch.dtype | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        row_scale = scale_of(rows, fmt, "row") * perturb_input
        product = torch._int_mm(quantize(rows, fmt, row_scale), codes).float() * row_scale * scale
        return (
            (product if bias is None else product + bias)
            .to(out or x.dtype)
            .view(*x.shape[:-1], scale.shape[0])
        )

    return forward
