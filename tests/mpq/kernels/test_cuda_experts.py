"""Experts on a GPU: one product of rows with their experts' matrices against float64, its operands decoded from their bytes.

Without a GPU Triton's interpreter runs ours, and what torch's grouped product would do with the operands is done from their bytes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_reference import DEVICE, drawn, epsilon, error
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes for Linux on x86-64 alone")

from mpq.formats.format import get_format
from mpq.formats.quantize import fake_quantize
from mpq.formats.scheme import SCHEMES
from mpq.kernels import bgemm, emulated, grouped, native_formats, scaled

#: rows of each expert: none, few, more than a tile of ours, none at the end
COUNTS = [0, 5, 70, 0, 1, 0]


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).int().to(DEVICE)


def one_by_one(x: Tensor, weights: Tensor, counts: list[int], linear: Any) -> Tensor:
    """Each expert's rows through a linear of its own, one after the other."""
    of_experts = zip(x.split(counts), weights, strict=True)
    return torch.cat([linear(w)(rows) for rows, w in of_experts])


@pytest.mark.parametrize("scheme", ["int8", "fp8_e4m3", "fp8_block"])
@pytest.mark.parametrize(("k", "c"), [(33, 7), (300, 140)])
def test_experts_equal_emulation(scheme: str, k: int, c: int) -> None:
    """What is emulated for accuracy, an expert at a time, whatever number of rows each gets; with perturbed scales, in x's dtype."""
    for dtype, perturb in ((torch.float32, 1.0), (torch.bfloat16, 1.3)):
        x, weights = drawn(sum(COUNTS), k, dtype=dtype), drawn(len(COUNTS), c, k, dtype=dtype)
        got = grouped.experts(weights, scheme, perturb, perturb)(x, ends_of(COUNTS))
        assert (got.dtype, got.shape) == (dtype, (len(x), c))

        def linear(w: Tensor, perturb: float = perturb) -> Any:
            return emulated.linear(w, None, SCHEMES[scheme], perturb, perturb)

        want = one_by_one(x.double(), weights.double(), COUNTS, linear)
        assert error(got, want) < 4e-3 + epsilon(dtype)


def test_tiles_of_128_rows() -> None:
    """With many rows an expert tiles are taller; no row is lost or doubled at an end, and no rows at all give none."""
    counts = [129, 0, 300]
    x, weights = drawn(sum(counts), 64), drawn(3, 20, 64)
    run = grouped.experts(weights, "int8")
    want = one_by_one(
        x.double(),
        weights.double(),
        counts,
        lambda w: emulated.linear(w, None, SCHEMES["int8"]),
    )
    assert error(run(x, ends_of(counts)), want) < 1e-3
    assert run(x[:0], ends_of([0, 0, 0])).shape == (0, 20)


def test_integers_are_summed_exactly() -> None:
    """Sums that pass 2^24 on the way, where FP32 would lose units, come back to the last one in each expert."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(64, 128, (4, 8192), generator=draw)
    weights = torch.randint(64, 128, (2, 3, 8192), generator=draw)
    weights[..., 4096:] *= -1
    x[:, 0] = weights[..., 0] = 127  # scales of exactly 1
    got = grouped.experts(weights.float().to(DEVICE), "int8")(x.float().to(DEVICE), ends_of([1, 3]))
    want = torch.cat([x[:1] @ weights[0].T, x[1:] @ weights[1].T])
    assert torch.equal(got.cpu().long(), want)


def test_what_torch_gets_is_the_definition() -> None:
    """Codes times scales are fake_quantize's weights and rows, bit for bit; what fills up is zero; K and C are multiples of 16."""
    fmt = get_format("fp8_e4m3")
    x, weights = drawn(sum(COUNTS), 33), drawn(len(COUNTS), 7, 33)
    held, rows = grouped.operand_of(weights, fmt), scaled.operand(x, fmt, 1.0)
    values = held.codes.float() * held.scales[..., None]
    assert torch.equal(values[:, :7, :33], fake_quantize(weights, fmt, "row"))
    assert not values[:, 7:].any()
    assert not values[..., 33:].any()
    assert held.codes.shape == (len(COUNTS), 16, bgemm.PADDING)
    got, want = rows.codes.float() * rows.scales[:, None], fake_quantize(x, fmt, "row")
    # in the middle between two values x / scale and x · (1 / scale) may fall to either side
    assert (got[:, :33] != want).float().mean() < 2e-3
    assert not got[:, 33:].any()


def by_hand(real: Any) -> Any:
    """What torch's grouped product is to do, in float64, once its own checks, `real` on tensors without numbers, let it pass."""

    def run(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, **how: Any) -> Tensor:
        offs = how["offs"]
        meta = [t.to("meta") for t in (a, b, a_scale, b_scale)]
        told: Tensor = real(*meta, **{**how, "offs": offs.to("meta")})
        assert a.shape[-1] % 16 == b.shape[-2] % 16 == b.shape[-1] % 16 == 0  # a GPU's alone
        assert offs.is_contiguous()
        parts = a.double() * a_scale[:, None], b.double() * b_scale[:, None]
        counts = torch.diff(offs, prepend=offs[:1] * 0).tolist()
        each = zip(parts[0].split(counts), parts[1], strict=True)
        return torch.cat([rows @ matrix for rows, matrix in each]).to(told.dtype)

    return run


@pytest.mark.skipif(DEVICE == "cuda", reason="there torch's own product runs, or is missing")
def test_torch_takes_the_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks of a GPU's grouped product find shapes, strides and dtypes right, and by its definition the operands
    give what is emulated."""
    monkeypatch.setattr(torch, "_scaled_grouped_mm", by_hand(torch._scaled_grouped_mm))
    monkeypatch.setattr(grouped, "_by_torch", lambda device: True)
    x, weights = drawn(sum(COUNTS), 50), drawn(len(COUNTS), 23, 50)
    got = grouped.experts(weights, "fp8_e4m3")(x, ends_of(COUNTS))
    want = one_by_one(
        x.double(),
        weights.double(),
        COUNTS,
        lambda w: emulated.linear(w, None, SCHEMES["fp8_e4m3"]),
    )
    assert (got.dtype, got.shape) == (torch.float32, (len(x), 23))
    assert error(got, want) < 8e-3  # BF16 comes out


def test_experts_are_one_operation_to_a_compiler() -> None:
    """torch.compile takes them without a break for any number of rows an expert gets, and they give the same numbers."""
    torch.compiler.reset()
    x, run = drawn(9, 33), grouped.experts(drawn(3, 7, 33), "fp8_e4m3")
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for counts in ([9, 0, 0], [2, 3, 4]):
        assert torch.equal(compiled(x, ends_of(counts)), run(x, ends_of(counts)))


def test_formats_of_experts_follow_from_the_compute_capability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """INT8 from 8.0, FP8 from 8.9 on; torch's own product on 9.0 and 10.0 alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {(8, 0): ("int8",)} | dict.fromkeys(
        [(8, 9), (9, 0), (10, 0), (12, 0)], ("fp8_e4m3", "int8", "fp8_block")
    )
    for capability, formats in found.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert native_formats("cuda", "experts") == formats
        assert grouped._by_torch(torch.device("cuda")) == (capability in ((9, 0), (10, 0)))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("scheme", ["int8", "fp8_e4m3", "fp8_block"])
def test_experts_are_captured(scheme: str) -> None:
    """A graph captured once sends other rows to other experts when it is replayed: nothing in it asks the host."""
    x, ends = drawn(sum(COUNTS), 64, dtype=torch.bfloat16), ends_of(COUNTS)
    run = grouped.experts(drawn(len(COUNTS), 32, 64, dtype=torch.bfloat16), scheme)
    run(x, ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, ends)
    ends.copy_(ends_of(COUNTS[::-1]))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, run(x, ends))
