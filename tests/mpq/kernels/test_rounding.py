"""The rounding in C++ against its definition, quantize.fake_quantize: every bit, on every kind of number."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from code_points import REFERENCE, code_points
from torch import Tensor

from mpq.formats.format import BLOCKED, FORMATS
from mpq.formats.quantize import fake_quantize
from mpq.kernels import rounding
from mpq.kernels.rounding import rounded

GRANULARITIES = ("row", "column")
DTYPES = (torch.float32, torch.bfloat16)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal bit for bit, signs of zeros too; one NaN is as good as another."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    nan, integers = want.isnan(), torch.int32 if want.dtype == torch.float32 else torch.int16
    assert torch.equal(got.isnan(), nan)
    bits = [t.contiguous().view(integers).masked_fill(nan, 0) for t in (got, want)]
    assert torch.equal(*bits)


def check(x: Tensor, perturbs: tuple[float, ...] = (1.0, 1.037)) -> None:
    """Every format, dtype and granularity rounds `x` as fake_quantize does, in inference mode and out of it."""
    for fmt in (*FORMATS.values(), *BLOCKED.values()):
        for dtype in DTYPES:
            for granularity in GRANULARITIES[:1] if fmt.by_blocks else GRANULARITIES:
                for perturb in perturbs:
                    arguments = (x.to(dtype), fmt, granularity, perturb)
                    assert_same_bits(rounded(*arguments), fake_quantize(*arguments))  # type: ignore[arg-type]
                    with torch.inference_mode():
                        assert_same_bits(rounded(*arguments), fake_quantize(*arguments))  # type: ignore[arg-type]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 33), (257, 129), (64, 1024), (2, 3, 17, 64)])
def test_random_rows(shape: tuple[int, ...]) -> None:
    """Odd sizes, with rows a million times larger than others."""
    assert rounding._library() is not None
    check(random(*shape) * torch.logspace(-3, 3, shape[-2])[:, None])


def test_any_bits() -> None:
    """Patterns of 32 bits drawn at random: every exponent, subnormals, infinities and NaN in the neighbourhoods of others."""
    bits = torch.randint(-(2**31), 2**31, (300, 1000), generator=torch.Generator().manual_seed(0))
    check(bits.to(torch.int32).view(torch.float32))


@pytest.mark.parametrize(
    "odd", [0.0, -0.0, 1e-45, 1e-40, -1.1e-38, 1.2e-38, 3e38, math.inf, -math.inf, math.nan]
)
@pytest.mark.parametrize("width", [1, 16, 37])
def test_odd_numbers(odd: float, width: int) -> None:
    """One odd number in some rows, a row full of it, a row of subnormals."""
    x = random(20, width)
    x[::2, width // 2], x[3] = odd, odd
    x[5] *= 1e-39
    check(x)


@pytest.mark.parametrize("name", REFERENCE)
def test_every_code_point_and_midpoint(name: str) -> None:
    """Rows that the largest code point scales by exactly 1: code points stay, midpoints and their neighbours round as defined."""
    values = torch.from_numpy(code_points(name)).float()
    middle = (values[:-1].double() + values[1:].double()).div(2).float()
    beside = [torch.nextafter(middle, torch.tensor(to)) for to in (-math.inf, math.inf)]
    x = torch.cat([values, middle, *beside, torch.tensor([FORMATS[name].maximum, -0.0])])[None]
    assert_same_bits(rounded(x, FORMATS[name], "row"), fake_quantize(x, FORMATS[name], "row"))
    assert torch.equal(rounded(x, FORMATS[name], "row")[0, : len(values)], values)


def test_every_int8_code_and_half() -> None:
    """−127..127 stay, halves go to the even code."""
    codes = torch.arange(-127, 128).float()
    x = torch.cat([codes, codes[:-1] + 0.5])[None]
    got = rounded(x, FORMATS["int8"], "row")
    assert torch.equal(got[0], torch.cat([codes, torch.round(codes[:-1] + 0.5)]))
    assert_same_bits(got, fake_quantize(x, FORMATS["int8"], "row"))


def test_strides() -> None:
    """Transposed, sliced and permuted tensors; heads moved before tokens keep their place in memory, and inputs their numbers."""
    x = random(2, 12, 6, 40)
    for view in (
        x.transpose(1, 2),
        x.transpose(-1, -2),
        x[:, ::2, :, 3:30],
        x.permute(3, 0, 1, 2),
        x[:, :1].expand(2, 12, 6, 40),
    ):
        before = view.clone()
        check(view)
        assert torch.equal(view, before)
    heads = x.transpose(1, 2)
    assert rounded(heads, FORMATS["fp8_e4m3"], "row").stride() == heads.stride()


def test_what_the_cpp_does_not_cover() -> None:
    """Empty tensors, vectors, FP16, one scale for all, FP64 and gradients go to the definition."""
    for fmt in FORMATS.values():
        for x in (torch.empty(0, 4), torch.empty(3, 0)):
            if not fmt.needs_scale:
                assert rounded(x, fmt, "row").shape == x.shape
        for x in (random(9), random(3, 9).half(), random(3, 9).double()):
            assert torch.equal(rounded(x, fmt, "row"), fake_quantize(x, fmt, "row"))
        assert torch.equal(
            rounded(random(3, 9), fmt, "tensor"), fake_quantize(random(3, 9), fmt, "tensor")
        )
    leaf = random(3, 9).requires_grad_()
    rounded(leaf, FORMATS["fp16"], "row").sum().backward()
    assert leaf.grad is not None


def test_numbers_in_the_format_are_not_copied() -> None:
    x = random(3, 9).bfloat16()
    assert rounded(x, FORMATS["bf16"], "row") is x


def test_without_a_compiler_torch_rounds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where C++ cannot be compiled fake_quantize itself answers, and the log says so once."""
    monkeypatch.setenv("CXX", "/no/such/compiler")
    rounding._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            check(random(4, 8))
    finally:
        rounding._library.cache_clear()
    assert caplog.text.count("/no/such/compiler") == 1
