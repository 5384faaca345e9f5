"""The CPU's native linears and attention beside torch's own, interleaved: `python bench/kernels.py`.

Square weights of each width, BF16 activations (what a BF16 model hands over), beside torch's own BF16 linear. INT8 includes the
quantization of the activations, per token (what runs in a plan) and per tensor (one outlying token costs all others their precision:
the error column; its activations are read twice, once for the scale). Attention is causal, heads in groups of four, in
FP32 (what an FP32 model hands over): torch's fused SDPA in FP32 is the base, SDPA in BF16 with its casts, and INT8 in both products.
BGEMM is Q x K alone, beside torch's FP32 product.

Ratios are medians over rounds (each runs the base and every kernel once, in random order) of the base's seconds to ours, with their
range; above 1 is faster than the base. Errors are relative to the float64 product. Last line: JSON.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from record import record
from torch import Tensor

from mpq.formats.format import get_format
from mpq.formats.quantize import quantize, scale_of
from mpq.kernels import cpu, int8_attention, int8_linear, native_formats, rows
from mpq.timing.pairs import keep_memory

TOKENS, WIDTHS, ROUNDS = (512, 1024, 2048, 4096), (512, 1024, 2048, 4096), 7
Inputs: TypeAlias = tuple[Tensor, ...]
Run: TypeAlias = Callable[..., Tensor]


def per_tensor(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """INT8 with one scale for all activations: the largest, then the codes, in two sweeps that torch.compile makes; all scales in the
    product itself."""
    fmt = get_format("int8")
    scale = scale_of(weight, fmt, "row")
    codes_of = torch.compile(codes_of_all, dynamic=True)
    if not cpu.has_quantized_linear():
        own = int8_linear.pack(quantize(weight, fmt, scale), scale.flatten(), None)

        def multiplied(x: Tensor) -> Tensor:
            codes, step = codes_of(x, torch.int16)
            return int8_linear.product(codes, step.expand(x.shape[0], 1).contiguous(), own, x.dtype)

        return multiplied
    packed = torch.ops.onednn.qlinear_prepack(quantize(weight, fmt, scale).contiguous(), None)
    flat, zero = scale.flatten(), torch.zeros(weight.shape[0], dtype=torch.int32)

    def forward(x: Tensor) -> Tensor:
        codes, step = codes_of(x, torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
            codes,
            float(step),
            rows.ZERO_POINT,
            packed,
            flat,
            zero,
            None,
            1.0,
            0,
            x.dtype,
            "none",
            [],
            "",
        )

    return forward


def codes_of_all(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of activations under one scale, with the zero point in unsigned ones, and the scale."""
    step = x.abs().amax().float() / 127
    codes = (x.float() / step).round() + (rows.ZERO_POINT if dtype == torch.uint8 else 0)
    return codes.to(dtype), step


def error(got: Tensor, want: Tensor) -> float:
    """Root of the mean square error relative to the product's own."""
    return float(
        (got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt()
    )


def compare(
    base: Run, kernels: dict[str, Run], want: Tensor, make: Callable[[], Inputs]
) -> dict[str, dict[str, object]]:
    """For each kernel: base's seconds over its own, median and range of ROUNDS rounds, and its error."""
    seconds: dict[str, list[float]] = {name: [] for name in ("", *kernels)}
    runs = list({"": base, **kernels}.items())
    rng = random.Random(0)
    for _ in range(ROUNDS + 1):  # the first compiles and prepares
        rng.shuffle(runs)
        for name, run in runs:
            fresh = make()  # other tensors: nothing made of the last ones is re-used
            start = time.perf_counter()
            run(*fresh)
            seconds[name].append(time.perf_counter() - start)
    found: dict[str, dict[str, object]] = {}
    for name, kernel in kernels.items():
        r = np.divide(seconds[""][1:], seconds[name][1:])
        found[name] = {
            "ratio": float(np.median(r)),
            "range": [float(r.min()), float(r.max())],
            "error": error(kernel(*make()), want),
        }
    return found


def linears() -> Iterator[dict[str, object]]:
    """Square BF16 linears."""
    for width in WIDTHS:
        weight = torch.randn(width, width, dtype=torch.bfloat16)
        kernels = {
            "fp32": partial(linear_in_fp32, weight.float()),
            "bf16": cpu.linear(weight, None, get_format("bf16")),
            "int8 per token": cpu.linear(weight, None, get_format("int8")),
            **(
                {"int8 per tensor": per_tensor(weight)}
                if cpu.has_quantized_linear() or int8_linear.available()
                else {}
            ),
        }
        for tokens in TOKENS:
            x = torch.randn(tokens, width, dtype=torch.bfloat16) * torch.logspace(-1, 1, tokens)[
                :, None
            ].to(torch.bfloat16)
            want = x.double() @ weight.double().T
            torch_own = partial(torch.nn.functional.linear, weight=weight)
            found = compare(torch_own, kernels, want, lambda x=x: (x.clone(),))
            yield {"tokens": tokens, "width": width, **found}


def linear_in_fp32(weight: Tensor, x: Tensor) -> Tensor:
    """torch's own FP32 linear on BF16 activations."""
    return torch.nn.functional.linear(x.float(), weight).to(x.dtype)


def bgemms() -> Iterator[dict[str, object]]:
    """Q x K of an FP32 model."""
    names = [f for f in ("bf16", "int8") if f in native_formats("cpu", "bgemm")]
    for tokens in TOKENS[:-1]:
        for heads, size in ((8, 64), (16, 128)):
            q, k = torch.randn(heads, tokens, size), torch.randn(heads, tokens, size)
            kernels: dict[str, Run] = {
                n: partial(product_in, cpu.bgemm(get_format(n))) for n in names
            }
            want = q.double() @ k.double().mT
            found = compare(
                partial(product_in, torch.matmul),
                kernels,
                want,
                lambda q=q, k=k: (q.clone(), k.clone()),
            )
            yield {"tokens": tokens, "heads": heads, "head_size": size, **found}


def product_in(product: Run, q: Tensor, k: Tensor) -> Tensor:
    """q times k's transpose."""
    return product(q, k.mT)


def attention_in(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused causal attention in `dtype`, in q's dtype."""
    q16, k16, v16 = (t.to(dtype) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        q16, k16, v16, is_causal=True, enable_gqa=True
    ).to(q.dtype)


def int8_attention_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ours, as (B, H, T, D)."""
    return int8_attention.attention(q, k, v, None, True, q.shape[-1] ** -0.5).transpose(1, 2)


def attentions() -> Iterator[dict[str, object]]:
    """Causal attention in an FP32 model."""
    kernels = {
        "bf16": partial(attention_in, torch.bfloat16),
        **({"int8": int8_attention_of} if int8_attention.available() else {}),
    }
    for tokens in TOKENS[:-1]:
        for heads, size in ((8, 64), (16, 128)):
            shapes = ((1, tokens, n, size) for n in (heads, heads // 4, heads // 4))
            q, k, v = (torch.randn(shape).transpose(1, 2) for shape in shapes)
            want = attention_in(torch.float64, q.double(), k.double(), v.double())
            found = compare(
                partial(attention_in, torch.float32),
                kernels,
                want,
                lambda qkv=(q, k, v): tuple(t.clone() for t in qkv),
            )
            yield {"tokens": tokens, "heads": heads, "head_size": size, **found}


@torch.inference_mode()
def main() -> None:
    keep_memory()
    torch.manual_seed(0)
    result: dict[str, list[dict[str, object]]] = {}
    for name, rows_of in (("attention", attentions), ("bgemm", bgemms), ("linear", linears)):
        for row in rows_of():
            result.setdefault(name, []).append(row)
            told = {
                n: f"{r['ratio']:.2f} (error {r['error']:.1e})" if isinstance(r, dict) else r
                for n, r in row.items()
            }
            print(name, told, flush=True)
    record("kernels", result)


if __name__ == "__main__":
    main()
