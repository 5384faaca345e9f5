"""Formats and quantizers: every code point of each narrow format against an independent reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from code_points import REFERENCE, code_points

from mpq.errors import MpqError
from mpq.formats.format import FORMATS, get_format
from mpq.formats.quantize import (
    binade,
    dequantize,
    fake_quantize,
    noise_variance,
    quantize,
    scale_of,
)

GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", REFERENCE)
def test_every_code_point_decodes(name: str) -> None:
    """Each code means what the reference says, and rounds to itself."""
    fmt, values = FORMATS[name], code_points(name)
    x = torch.from_numpy(values.astype(np.float32))
    assert torch.equal(dequantize(quantize(x, fmt), fmt).double(), torch.from_numpy(values))
    assert values.max() == fmt.maximum
    normal = values[values > 0]
    assert fmt.min_normal_exponent - fmt.mantissa_bits == math.log2(normal.min())


@pytest.mark.parametrize("name", REFERENCE)
def test_between_code_points(name: str) -> None:
    """Between two neighbours, a quarter of the way and at the midpoint, rounding is to nearest, ties to even."""
    values = code_points(name)
    low, high = values[:-1], values[1:]
    for share in (0.25, 0.5, 0.75):
        between = (low + share * (high - low)).astype(np.float32)
        expected = between.astype(REFERENCE[name]).astype(np.float64)
        got = (
            dequantize(quantize(torch.from_numpy(between), FORMATS[name]), FORMATS[name])
            .double()
            .numpy()
        )
        np.testing.assert_array_equal(got, expected)


def test_every_int8_code() -> None:
    """−127..127 decode to code · scale; halves round to even; nothing reaches −128."""
    fmt, scale = FORMATS["int8"], torch.tensor(0.25)
    codes = torch.arange(-127, 128)
    assert torch.equal(quantize(codes * 0.25, fmt, scale).long(), codes)
    assert torch.equal(dequantize(codes.to(torch.int8), fmt, scale), codes * 0.25)
    halves = (codes[:-1].double() + 0.5) * 0.25
    expected = np.rint(codes[:-1].numpy() + 0.5)
    np.testing.assert_array_equal(quantize(halves.float(), fmt, scale).numpy(), expected)
    assert quantize(torch.tensor([-1e9, 1e9]), fmt, scale).tolist() == [-127, 127]


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_overflow_saturates(name: str) -> None:
    """Beyond the maximum is the maximum, not NaN or infinity; NaN stays NaN."""
    fmt = FORMATS[name]
    x = torch.tensor([1e9, -1e9, fmt.maximum * 1.01, math.inf])
    assert dequantize(quantize(x, fmt), fmt).tolist() == [
        fmt.maximum,
        -fmt.maximum,
        fmt.maximum,
        fmt.maximum,
    ]
    assert torch.isnan(dequantize(quantize(torch.tensor([math.nan]), fmt), fmt)).all()


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_scales_map_the_largest_onto_the_maximum(name: str, granularity: str) -> None:
    """On odd shapes each neighbourhood's largest value is kept exactly, up to one rounding of the scale."""
    fmt = FORMATS[name]
    x = torch.randn(3, 5, 7, generator=GENERATOR) * 10.0 ** torch.arange(-2, 3).view(1, 5, 1)
    scale = scale_of(x, fmt, granularity)
    amax = {
        "tensor": x.abs().max(),
        "row": x.abs().amax(-1, keepdim=True),
        "column": x.abs().amax(-2, keepdim=True),
    }[granularity]
    torch.testing.assert_close(scale * fmt.maximum, torch.broadcast_to(amax, scale.shape))
    back = fake_quantize(x, fmt, granularity)
    at = x.abs() == torch.broadcast_to(amax, x.shape)
    torch.testing.assert_close(back[at], x[at], rtol=1e-6, atol=0)


def test_zero_and_tiny_tensors() -> None:
    """All-zero neighbourhoods stay zero, and numbers near the smallest float make no NaN."""
    for fmt in FORMATS.values():
        assert torch.equal(fake_quantize(torch.zeros(4, 4), fmt, "row"), torch.zeros(4, 4))
        assert torch.isfinite(fake_quantize(torch.full((2, 2), 1e-42), fmt, "row")).all()


@pytest.mark.parametrize("name", ["bf16", "fp8_e4m3", "fp8_e5m2"])
def test_ulp_noise_is_the_real_noise(name: str) -> None:
    """In every binade the mean squared rounding error is ulp²/12; over binades 0.54 of the paper's."""
    fmt = FORMATS[name]
    for exponent in (-3, 0, 4):
        u = 2.0**exponent * (1 + torch.rand(200_000, generator=GENERATOR))
        measured = (dequantize(quantize(u, fmt), fmt) - u).double().square().mean().item()
        assert measured == pytest.approx(
            noise_variance(u, fmt, "ulp").double().mean().item(), rel=0.02
        )
    log_uniform = 2.0 ** torch.rand(200_000, generator=GENERATOR)
    ratio = noise_variance(log_uniform, fmt, "ulp") / noise_variance(log_uniform, fmt, "paper")
    assert ratio.mean().item() == pytest.approx(
        0.75 / (2 * math.log(2)), rel=0.01
    )  # the mean of 1/u² over a binade: 0.54


def test_int8_noise_is_the_real_noise() -> None:
    """Δ²/12 with the scale of each row."""
    u = torch.randn(64, 4096, generator=GENERATOR) * torch.logspace(-2, 2, 64).view(-1, 1)
    measured = (fake_quantize(u, FORMATS["int8"], "row") - u).double().square().mean(-1)
    torch.testing.assert_close(
        measured, noise_variance(u, FORMATS["int8"], "ulp").double().mean(-1), rtol=0.05, atol=0
    )


def test_binade() -> None:
    """2^floor(log2|u|), by another way."""
    u = torch.randn(1000, generator=GENERATOR)
    assert torch.equal(binade(u).double(), 2.0 ** torch.floor(torch.log2(u.abs().double())))
    assert binade(torch.zeros(1)).item() == 0


def test_names() -> None:
    """Names are found however they are spelt; an unknown one is told with those that exist."""
    assert get_format("FP8-E4M3") is FORMATS["fp8_e4m3"]
    with pytest.raises(MpqError, match=r"Unknown format 'fp4': expected one of fp32, bf16"):
        get_format("fp4")
