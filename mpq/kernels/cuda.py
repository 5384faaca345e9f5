"""Native kernels of an NVIDIA GPU: 16-bit formats by casting, FP8 linears by torch._scaled_mm, FP8 attention in Triton.

Linears in INT8 and in blocks are in scaled.py, experts in grouped.py.

A linear in FP8 is two launches, the second cuBLAS's (Hopper) or CUTLASS's:

    rows (T, K) -> codes (T, K padded), scale (T)              amax, divide, round in one pass (fp8.py)
    codes x weight (K padded, C padded) -> y (T, C)            both scales and the bias fused

Scales are one for each token and one for each output channel, which costs no more than one for each tensor and keeps a token's
precision whatever its neighbours hold. Codes are shared by the linears that read the same activations (q, k and v; gate and
up). Under torch.compile the quantization is torch's own operations, which inductor fuses with what made the activations.

E5M2 is for activations alone: there is no matrix instruction in cuBLAS for E5M2 times E5M2, so weights are E4M3 then.

Fast accumulation: Hopper's FP8 instructions sum into some 14 bits (13 after the point); without it, cuBLAS adds those sums to FP32
ones every 128 terms. It is on, as in the forward pass of the engines that serve FP8; bench/gpu_campaign.py measures its speed
and its error, to be held against that of rounding both operands (E4M3: 3.7 % of the output's size).

Attention takes the best path that there is for each choice of formats, and base is left alone:

    nothing lowered           what the model is configured with: SDPA, hence FlashAttention or cuDNN
    both in one 16-bit format the same, in that format
    anything in FP8           one fused kernel with a format for each product (flash.py), where SDPA is what the model runs
    otherwise                 the model's own eager function with FP8 products (bgemm.py): soft caps, sinks, position biases

Whether leaving a fused attention for FP8 products is worth it is nothing that this module decides: timing measures each
configuration as it runs, against the base as it runs, and the program takes it only if it gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpq.formats.format import Format, get_format
from mpq.formats.quantize import Granularity, quantize, scale_of
from mpq.kernels import bgemm, cpu, flash, scaled
from mpq.kernels.emulated import Linear
from mpq.kernels.fp8 import quantize_rows
from mpq.kernels.grouped import experts as experts
from mpq.models.attention import AttentionHandler, PlainAttention

MULTIPLE = 16  # of K and C, asked for by torch._scaled_mm
_last = cpu.LastInput()


def linear(
    weight: Tensor,
    bias: Tensor | None,
    fmt: Format,
    perturb_input: float = 1.0,
    perturb_weight: float = 1.0,
    *,
    granularity: Granularity = "row",
    input_scale: float | None = None,
    fast: bool = True,
) -> Linear:
    """`x (..., K) -> (..., C)` computed in `fmt`; `weight` (C, K) is converted once. What is returned takes the output's dtype
    as a second argument, x's if left out.

    `granularity` is that of the scales of FP8: `row` (each token, each output channel) or `tensor`. `input_scale` fixes the
    scale of the activations beforehand (what it does not cover is clipped); else each call measures its own. `fast`: above.
    `perturb_*` multiply the scales of FP8, INT8 and blocks, of which the other arguments say nothing.
    """
    if not fmt.needs_scale:
        return cpu.linear(weight, bias, fmt)
    if fmt.kind == "int" or fmt.by_blocks:
        return scaled.linear(weight, bias, fmt, perturb_input, perturb_weight)
    stored = get_format("fp8_e4m3")
    channels, k = weight.shape
    padded = nn.functional.pad(weight.detach(), (0, -k % MULTIPLE, 0, -channels % MULTIPLE))
    weight_scale = scale_of(padded, stored, granularity) * perturb_weight
    codes = quantize(padded, stored, weight_scale).t()
    weight_scale = weight_scale.reshape(1, -1) if granularity == "row" else weight_scale.reshape(())
    bias = None if bias is None else nn.functional.pad(bias.detach(), (0, -channels % MULTIPLE))
    given = (
        None
        if input_scale is None
        else torch.tensor(input_scale, dtype=torch.float32, device=weight.device)
    )
    how = (fmt.name, granularity, perturb_input, input_scale)

    def forward(x: Tensor, out: torch.dtype | None = None) -> Tensor:
        out = out or x.dtype
        if torch.compiler.is_compiling():
            lowered, scale = _torch_rows(x, fmt, granularity, perturb_input, given)
        else:
            lowered, scale = _last.get(
                x, how, lambda: _rows(x, fmt, granularity, perturb_input, given)
            )
        written = out if out == torch.bfloat16 or _any_output(x.device) else torch.bfloat16
        fused = bias if bias is not None and written != torch.float32 else None
        y = torch._scaled_mm(
            lowered,
            codes,
            scale_a=scale,
            scale_b=weight_scale,
            bias=None if fused is None else fused.to(written),
            out_dtype=written,
            use_fast_accum=fast,
        )
        y = y if bias is None or fused is not None else y + bias
        return y[:, :channels].to(out).reshape(*x.shape[:-1], channels)

    return forward


def _any_output(device: torch.device) -> bool:
    """Whether scaled products come in any dtype: cuBLAS's, on Hopper from CUDA 12.9 on, and a CPU's. CUTLASS writes BF16."""
    if device.type != "cuda":
        return True
    version = tuple(int(n) for n in (torch.version.cuda or "0.0").split(".")[:2])
    return torch.cuda.get_device_capability(device) == (9, 0) and version >= (12, 9)


def _tensor_scale(x: Tensor, fmt: Format, perturb: float) -> Tensor:
    scale = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32) / fmt.maximum
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0) * perturb


def _rows(
    x: Tensor, fmt: Format, granularity: Granularity, perturb: float, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes (T, K padded) and scales, (T, 1) or a scalar, as torch._scaled_mm takes them."""
    if granularity == "tensor" and given is None:
        given = _tensor_scale(x, fmt, perturb)
    codes, scales = quantize_rows(x, fmt, MULTIPLE, perturb, given)
    codes = codes.view(-1, codes.shape[-1])
    return codes, scales.view(-1, 1) if granularity == "row" or given is None else given


def _torch_rows(
    x: Tensor, fmt: Format, granularity: Granularity, perturb: float, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in torch's operations, for inductor to fuse."""
    rows = nn.functional.pad(x.reshape(-1, x.shape[-1]), (0, -x.shape[-1] % MULTIPLE))
    if given is None:
        given = (
            scale_of(rows, fmt, "row") * perturb
            if granularity == "row"
            else _tensor_scale(rows, fmt, perturb)
        )
    scale = given.expand(len(rows), 1).contiguous() if granularity == "row" else given
    return quantize(rows, fmt, scale), scale


class Attention(AttentionHandler):
    """Attention with its products in `qk` and `av` (None: base), its output in `out` (the query's dtype if left out). `perturb`
    multiplies the scales of Q, K, P and V."""

    grouped = True

    def __init__(
        self,
        qk: Format | None,
        av: Format | None,
        out: torch.dtype | None = None,
        perturb: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    ):
        self._qk, self._av, self.out, self._perturb = qk, av, out, perturb
        same = qk is not None and qk == av and not qk.needs_scale
        self.dtype = getattr(torch, qk.dtype) if same and qk is not None else None

    def fused(self, attention: PlainAttention) -> Tensor | None:
        """The whole attention in one kernel, unless the head dimension is too large for it."""
        a = attention
        if max(a.query.shape[-1], a.value.shape[-1]) > flash.MAX_HEAD_DIM:
            return None
        qk, av = ("" if f is None else f.name for f in (self._qk, self._av))
        function = _attention_op if torch.compiler.is_compiling() else _attention
        return function(a.query, a.key, a.value, a.mask, qk, av, a.scaling, a.causal, self._perturb)

    def qk(self, query: Tensor, key_t: Tensor) -> Tensor:
        """(B, H, T, D) x (B, H_kv, D, S) -> (B, H, T, S)."""
        return _product(query, key_t, self._qk, *self._perturb[:2])

    def av(self, p: Tensor, value: Tensor) -> Tensor:
        """(B, H, T, S) x (B, H_kv, S, D_v) -> (B, H, T, D_v)."""
        return _product(p, value, self._av, *self._perturb[2:])


def _product(
    a: Tensor, b: Tensor, fmt: Format | None, perturb_a: float, perturb_b: float
) -> Tensor:
    if fmt is not None and fmt.needs_scale:
        function = _matmul_op if torch.compiler.is_compiling() else _matmul
        return function(a, b, fmt.name, perturb_a, perturb_b)
    dtype: Any = a.dtype if fmt is None else getattr(torch, fmt.dtype)
    batch, heads, length, k = a.shape
    tall = a.reshape(batch, b.shape[1], -1, k).to(
        dtype
    )  # heads that share one of `b` as rows of one matrix
    return torch.matmul(tall, b.to(dtype)).to(a.dtype).view(batch, heads, length, -1)


def _matmul(a: Tensor, b: Tensor, fmt: str, perturb_a: float, perturb_b: float) -> Tensor:
    return bgemm.matmul(a, b, get_format(fmt), perturb_a, perturb_b)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    qk: str,
    av: str,
    scaling: float,
    causal: bool,
    perturb: Sequence[float],
) -> Tensor:
    qk_format, av_format = (get_format(name) if name else None for name in (qk, av))
    return flash.attention(
        query,
        key,
        value,
        qk_format,
        av_format,
        scaling=scaling,
        causal=causal,
        mask=mask,
        perturb=perturb,
    )


# one operation each to torch.compile, which would otherwise look into the launches
_attention_op = torch.library.custom_op("mpq::fp8_attention", _attention, mutates_args=())
_matmul_op = torch.library.custom_op("mpq::fp8_matmul", _matmul, mutates_args=())


@_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1])


@_matmul_op.register_fake
def _(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])
