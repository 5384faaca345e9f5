"""The CPU's native linears beside torch's own BF16 linear, interleaved: `python bench/kernels.py`.

Square weights of each width, BF16 activations (what a BF16 model hands over). INT8 includes the quantization of the activations,
per token (what runs in a plan) and per tensor (no third pass; one outlying token costs all others their precision: the error column).
Ratios are medians over pairs of torch's BF16 seconds to ours, with their range; above 1 is faster than BF16. Last line: JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from record import record
from torch import Tensor

from mpq.formats import get_format
from mpq.kernels import cpu, rows
from mpq.pairs import keep_memory
from mpq.quantize import quantize, scale_of

TOKENS, WIDTHS, PAIRS = (512, 2048, 4096), (512, 1024, 2048, 4096), 7


def per_tensor(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """INT8 with one scale for all activations: fused into oneDNN's product whole."""
    fmt = get_format("int8")
    scale = scale_of(weight, fmt, "row")
    packed = torch.ops.onednn.qlinear_prepack(quantize(weight, fmt, scale).contiguous(), None)
    flat, zero = scale.flatten(), torch.zeros(weight.shape[0], dtype=torch.int32)

    def forward(x: Tensor) -> Tensor:
        step = float(x.abs().amax()) / 127
        codes = torch.quantize_per_tensor(x.float(), step, rows.ZERO_POINT, torch.quint8).int_repr()
        return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
            codes, step, rows.ZERO_POINT, packed, flat, zero, None, 1.0, 0, x.dtype, "none", [], ""
        )  # fmt: skip

    return forward


def error(got: Tensor, want: Tensor) -> float:
    """Root of the mean square error relative to the product's own."""
    return float((got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt())


@torch.inference_mode()
def main() -> None:
    keep_memory()
    torch.manual_seed(0)
    table = []
    for width in WIDTHS:
        weight = torch.randn(width, width, dtype=torch.bfloat16)
        kernels = {
            "bf16": cpu.linear(weight, None, get_format("bf16")),
            "int8 per token": cpu.linear(weight, None, get_format("int8")),
            "int8 per tensor": per_tensor(weight),
        }
        for tokens in TOKENS:
            x = torch.randn(tokens, width, dtype=torch.bfloat16) * torch.logspace(-1, 1, tokens)[:, None].to(torch.bfloat16)
            want = x.double() @ weight.double().T
            ratios: dict[str, list[float]] = {name: [] for name in kernels}
            for _ in range(PAIRS + 1):  # the first compiles and prepares
                for name, kernel in kernels.items():
                    fresh = x.clone()  # another tensor: nothing made of the last one is re-used
                    start = time.perf_counter()
                    torch.nn.functional.linear(fresh, weight)
                    middle = time.perf_counter()
                    kernel(fresh)
                    ratios[name].append((middle - start) / (time.perf_counter() - middle))
            row = {
                name: {
                    "ratio": float(np.median(r[1:])),
                    "range": [min(r[1:]), max(r[1:])],
                    "error": error(kernels[name](x), want),
                }
                for name, r in ratios.items()
            }
            table.append({"tokens": tokens, "width": width, **row})
            print(tokens, width, {name: f"{r['ratio']:.2f} (error {r['error']:.1e})" for name, r in row.items()}, flush=True)
    record("kernels", table)


if __name__ == "__main__":
    main()
