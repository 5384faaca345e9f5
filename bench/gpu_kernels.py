"""Each kernel of a model's prefill beside the machine's own ceilings: part `kernels` of gpu_campaign.py.

Ceilings are measured, not read off a datasheet: a large copy (bytes read and written), large matrix products in base and, on a
GPU, in FP8. Floating-point operations and bytes are those that the kernel must do and move: operands read once, results written
once. On a GPU a kernel is repeated inside one captured graph and timed by events, so that launches are not in its time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from mpq.formats.format import get_format
from mpq.formats.scheme import get_scheme
from mpq.kernels import native_formats, native_kernels

INSIDE, REPLAYS = 4, 7
#: tiles to try for fused attention (rows of Q, keys, warps, stages), by head dimension
TILES = {
    64: [(128, 128, 8, 3), (64, 128, 4, 3), (128, 64, 8, 3), (64, 64, 4, 4)],
    128: [(128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 3)],
    256: [(64, 64, 8, 2), (128, 64, 8, 2)],
}
Row = dict[str, Any]


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Median seconds of one call, warmed up."""
    run()
    if device == "cpu":
        found = []
        for _ in range(REPLAYS):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return float(np.median(found))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(INSIDE):
            run()
    found = []
    for _ in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / INSIDE)
    return float(np.median(found[2:]))


def ceilings(device: str, base: torch.dtype) -> dict[str, float]:
    """Bytes per second of a copy; operations per second of a matrix product in base and, where there is one, in FP8."""
    size = 8192 if device != "cpu" else 512
    x = torch.empty(2**30 if device != "cpu" else 2**24, dtype=torch.uint8, device=device)
    y, a = torch.empty_like(x), torch.randn(size, size, device=device, dtype=base)
    found = {"bytes_per_s": 2 * x.numel() / seconds_of(lambda: y.copy_(x), device)}
    found["base_flops"] = 2 * size**3 / seconds_of(lambda: a @ a.T, device)
    if "fp8_e4m3" in native_formats(device):
        codes, one = a.to(torch.float8_e4m3fn), torch.ones((), device=device)
        for name, fast in (("fp8_flops", True), ("fp8_slow_flops", False)):
            found[name] = (
                2
                * size**3
                / seconds_of(
                    lambda: torch._scaled_mm(
                        codes,
                        codes.T,
                        scale_a=one,
                        scale_b=one,
                        out_dtype=torch.bfloat16,
                        use_fast_accum=fast,
                    ),
                    device,
                )
            )
    return found


def error(got: Tensor, want: Tensor) -> float:
    """Root of the mean square difference over that of `want`, on the first rows: float64 is slow on a GPU."""
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


def linears(
    shapes: dict[str, tuple[int, int]], tokens: int, device: str, base: torch.dtype
) -> list[Row]:
    """A row for each linear (name → K, C) and way of computing it; `error` is against float64 on unrounded operands."""
    rows: list[Row] = []
    make = native_kernels(device).linear
    for name, (k, c) in shapes.items():
        x, weight = (torch.randn(n, k, device=device, dtype=base) for n in (tokens, c))
        ways: dict[str, Any] = {"base": lambda t, weight=weight: linear(t, weight)}
        for scheme in (s for f in native_formats(device) if (s := get_scheme(f)).activations):
            if getattr(torch, scheme.weights.dtype) != base and scheme.name != "fp32":
                ways[scheme.name] = make(weight, None, scheme.weights)
        if "fp8_e4m3" in ways:
            e4m3 = get_format("fp8_e4m3")
            ways["fp8_e4m3 without fast accumulation"] = make(weight, None, e4m3, fast=False)
            ways["fp8_e4m3 by tensor"] = make(weight, None, e4m3, granularity="tensor")
            ways["fp8_e4m3 by tensor, static"] = make(
                weight, None, e4m3, granularity="tensor", input_scale=0.01
            )
        few = x[:64].double() @ weight.double().T
        for way, run in ways.items():
            # a view, each time another tensor: nothing that was made of the last one is used again
            size = x.element_size() if way == "base" else get_scheme(way.split()[0]).bytes
            rows.append(
                {
                    "kernel": f"linear {name}",
                    "way": way,
                    "seconds": seconds_of(lambda: run(x.view(x.shape)), device),
                    "flop": 2.0 * tokens * k * c,
                    "bytes": x.element_size() * tokens * (k + c) + size * k * c,
                    "error": error(run(x[:64]), few),
                }
            )
        if "fp8_e4m3" in ways:
            from mpq.kernels.fp8 import quantize_rows

            rows.append(
                {
                    "kernel": f"quantize {name}",
                    "way": "fp8_e4m3",
                    "seconds": seconds_of(lambda: quantize_rows(x, get_format("fp8_e4m3")), device),
                    "flop": 0.0,
                    "bytes": (x.element_size() + 1.0) * tokens * k,
                    "error": None,
                }
            )
    return rows


def attentions(
    batch: int, length: int, heads: int, kv_heads: int, dim: int, device: str, base: torch.dtype
) -> tuple[list[Row], Any]:
    """Causal attention as the base runs it and, where there is FP8, with either product or both in it, fused and as products.

    The fused kernel's tile is the fastest of TILES with both in FP8; it stays set, and is returned. `flop` counts the half of
    both products that causal attention needs, which is as much as the whole of one.
    """
    rows: list[Row] = []
    q, k, v = (
        torch.randn(batch, length, h, dim, device=device, dtype=base).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    )
    about = {
        "flop": 2.0 * batch * heads * length**2 * dim,
        "bytes": 1.0 * q.element_size() * batch * length * dim * 2 * (heads + kv_heads),
    }
    want = scaled_dot_product_attention(
        q[:1].double(), k[:1].double(), v[:1].double(), is_causal=True, enable_gqa=True
    )

    def print_speed(way: str, run: Callable[[], Tensor], transposed: bool) -> float:
        output = run()[:1]
        seconds = seconds_of(run, device)
        rows.append(
            {
                "kernel": "attention",
                "way": way,
                "seconds": seconds,
                **about,
                "error": error(output.transpose(1, 2) if transposed else output, want),
            }
        )
        return seconds

    print_speed(
        "base: SDPA",
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        False,
    )
    if "fp8_e4m3" not in native_formats(device, "bgemm"):
        return rows, None
    from mpq.kernels import bgemm, flash

    e4m3, scaling = get_format("fp8_e4m3"), dim**-0.5
    place = max(64, 2 ** math.ceil(math.log2(dim)))
    timed = {}
    for tile in TILES[place]:
        flash.TILES[place] = tile
        way = f"fused fp8_e4m3, fp8_e4m3, tile {tile}"
        timed[tile] = print_speed(
            way, lambda: flash.attention(q, k, v, e4m3, e4m3, scaling=scaling, causal=True), True
        )
    flash.TILES[place] = min(timed, key=timed.__getitem__)
    for qk, av in ((e4m3, None), (None, e4m3), (None, None)):
        way = f"fused {', '.join(f.name if f else 'base' for f in (qk, av))}"
        print_speed(
            way, lambda: flash.attention(q, k, v, qk, av, scaling=scaling, causal=True), True
        )
    p = torch.rand(batch, heads, length, length, device=device, dtype=base)
    for way, run in (
        ("product qk", lambda: bgemm.matmul(q, k.mT, e4m3)),
        ("product av", lambda: bgemm.matmul(p, v, e4m3)),
    ):
        rows.append(
            {
                "kernel": way,
                "way": "fp8_e4m3",
                "seconds": seconds_of(run, device),
                "flop": about["flop"],
                "bytes": 1.0 * p.numel() * p.element_size() + about["bytes"] / 2,
                "error": None,
            }
        )
    return rows, flash.TILES[place]


def with_shares(rows: list[Row], found: dict[str, float]) -> pl.DataFrame:
    """The rows with what they achieve, and the share of the ceiling that binds them: the larger of their two times over theirs."""
    for row in rows:
        lowered = "fp8" in row["way"]
        roof = found.get("fp8_flops", found["base_flops"]) if lowered else found["base_flops"]
        floor = max(row["flop"] / roof, row["bytes"] / found["bytes_per_s"])
        row |= {
            "flops": row["flop"] / row["seconds"],
            "bytes_per_s": row["bytes"] / row["seconds"],
            "share_of_ceiling": floor / row["seconds"],
        }
    return pl.DataFrame(rows, infer_schema_length=None)


def roofline(kernels: pl.DataFrame, found: dict[str, float], title: str) -> Figure:
    """Operations per second against operations per byte, under the measured ceilings."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    intensity = np.logspace(-1, 4, 200)
    for name, color in (("base_flops", "#444444"), ("fp8_flops", "#d55e00")):
        if name in found:
            label = f"ceiling, {name.removesuffix('_flops')}: {found[name] / 1e12:.3g} TFLOP/s"
            axes.loglog(
                intensity,
                np.minimum(intensity * found["bytes_per_s"], found[name]),
                color=color,
                linewidth=1,
                label=label,
            )
    marks = {"linear": "o", "attention": "s", "product": "^"}
    for (kernel, way), rows in kernels.filter(pl.col("flop") > 0).group_by(
        "kernel", "way", maintain_order=True
    ):
        low = "fp8" in str(way)
        axes.loglog(
            rows["flop"] / rows["bytes"],
            rows["flops"],
            marks[str(kernel).split()[0]],
            markerfacecolor="none",
            color="#d55e00" if low else "#0072b2",
            markersize=6,
        )
    for kind, mark in marks.items():
        axes.plot(
            [], [], mark, markerfacecolor="none", color="#0072b2", label=f"{kind} (orange: FP8)"
        )
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("operations per second")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=7)
    return figure
