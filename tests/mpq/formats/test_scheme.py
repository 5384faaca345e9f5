"""Schemes, each against an independent reference: compressed-tensors' presets and rounding, ml_dtypes' code points."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as reference
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from small import ROOT
from torch import Tensor

from mpq.errors import MpqError
from mpq.formats.format import BLOCKED, FORMATS, Format
from mpq.formats.page import page
from mpq.formats.quantize import (
    blocks_of,
    fake_quantize,
    from_blocks,
    quantize,
    scale_of,
    share_of,
)
from mpq.formats.scheme import SCHEMES, Scheme, get_scheme, mac_time
from mpq.kernels.rounding import rounded
from mpq.spec import parse_spec

PRESETS = [s.name for s in SCHEMES.values() if s.preset and s.weights.fit == "max"]
# by the formats' own documents: bits of an element, and of a scale over the elements that share it
EFFECTIVE = {
    "fp8_e4m3": 8,
    "fp8_block": 8 + 32 / 128**2,
    "int8": 8,
    "mxfp8": 8 + 8 / 32,
    "mxfp4": 4 + 8 / 32,
    "nvfp4": 4 + 8 / 16,
    "w4a16": 4 + 16 / 128,
    "w4a16_g32": 4 + 16 / 32,
    "w8a16": 8,
    "nvfp4a16": 4 + 8 / 16,
    "mxfp4a16": 4 + 8 / 32,
    "w4a8": 4 + 16 / 128,
}


def numbers(rows: int = 256, columns: int = 512, seed: int = 0) -> Tensor:
    """Rows a hundred thousand times larger than others, rows and blocks of zeros, an outlier, subnormals."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x = x * torch.logspace(-3, 2, rows)[:, None]
    x[3], x[7, 16:32], x[9, 0], x[11, 5] = 0, 0, 1e4, 1e-39
    return x


@pytest.mark.parametrize("name", EFFECTIVE)
def test_effective_bits(name: str) -> None:
    """A weight's own bits and its share of its block's scale, as the formats' documents have them."""
    assert get_scheme(name).bits == pytest.approx(EFFECTIVE[name], rel=1e-9)


def arguments_of(fmt: Format) -> tuple[int, str, int | list[int] | None]:
    """Bits, kind, and what shares a scale, as compressed-tensors says them."""
    rows, columns = fmt.block
    return fmt.bits, fmt.kind, [rows, columns] if rows > 1 else columns or None


@pytest.mark.parametrize("name", PRESETS)
def test_schemes_are_the_presets(name: str) -> None:
    """Elements and what shares a scale are those of compressed-tensors' scheme of that name, for both operands."""
    scheme, preset = get_scheme(name), preset_name_to_scheme(SCHEMES[name].preset, ["Linear"])
    for fmt, args in (
        (scheme.weights, preset.weights),
        (scheme.activations, preset.input_activations),
    ):
        assert (fmt is None) == (args is None)
        if fmt and args:
            found = (args.num_bits, str(args.type), args.block_structure or args.group_size)
            assert arguments_of(fmt) == found


def by_compressed_tensors(x: Tensor, fmt: Format, args: QuantizationArgs) -> Tensor:
    """A round trip as compressed-tensors makes it, scales and all."""
    parts = blocks_of(x, fmt) if fmt.by_blocks else x
    ends = parts.amin(-1, keepdim=not fmt.by_blocks), parts.amax(-1, keepdim=not fmt.by_blocks)
    share = None
    if fmt.scale == "e4m3":  # its global scale, down to a power of two: any is allowed
        share = torch.exp2(torch.floor(torch.log2(generate_gparam(x.min(), x.max()))))
    scale, zero = calculate_qparams(*ends, args, global_scale=share)
    if fmt.scale == "bf16":
        scale = scale.bfloat16().float()
    return reference(x, scale, zero, args, global_scale=share)


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "int8"])
def test_rounding_is_that_of_compressed_tensors(name: str) -> None:
    """Bit for bit, weights and activations. INT8 alone differs: its largest goes onto 127 here, as engines have it."""
    scheme, preset = get_scheme(name), preset_name_to_scheme(SCHEMES[name].preset, ["Linear"])
    x = numbers()
    assert torch.equal(
        fake_quantize(x, scheme.weights, "row"),
        by_compressed_tensors(x, scheme.weights, preset.weights),
    )
    if scheme.activations is not None and scheme.activations.kind == "float":
        found = fake_quantize(x, scheme.activations, "row")
        assert torch.equal(
            found, by_compressed_tensors(x, scheme.activations, preset.input_activations)
        )


def test_every_code_of_four_bits() -> None:
    """E2M1's sixteen codes and the middles between them round as ml_dtypes rounds; INT4 has -8 to 7."""
    fmt = BLOCKED["nvfp4"]
    codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    values = np.unique(codes)
    middles = (values[1:] + values[:-1]) / 2
    x = np.concatenate([codes, middles, np.nextafter(middles, np.float32(9)), [7.0, -100.0]])
    want = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    found = quantize(torch.from_numpy(x.astype(np.float32)), fmt)
    assert np.array_equal(found.numpy(), want)
    assert quantize(torch.arange(-12.0, 12), BLOCKED["int4_128"]).unique().tolist() == [
        *range(-8, 8)
    ]


def test_scales_are_what_they_are_stored_as() -> None:
    """Every scale is a value of its own format: a power of two of E8M0, a BF16, an E4M3 value over the tensor's share."""
    x = numbers(64, 256)
    for fmt in BLOCKED.values():
        scale, share = scale_of(blocks_of(x, fmt), fmt, "row"), share_of(x, fmt)
        kept = {
            "fp32": np.float32,
            "bf16": ml_dtypes.bfloat16,
            "e8m0": ml_dtypes.float8_e8m0fnu,
            "e4m3": ml_dtypes.float8_e4m3fn,
        }[fmt.scale]
        values = (scale * share).numpy()
        np.testing.assert_allclose(values.astype(kept).astype(np.float32), values, rtol=1e-6)


def test_fitted_scales_have_the_least_error_of_their_block() -> None:
    """As numpy finds by trying each scale for each group of 32; never more than the largest magnitude's own, mostly less."""
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(5))
    plain, fitted = SCHEMES["w4a16_g32"].weights, SCHEMES["w4a16_g32_mse"].weights

    def errors(found: Tensor) -> np.ndarray:
        return ((found - x) ** 2).reshape(-1, 32).sum(1).numpy()

    groups = x.numpy().reshape(-1, 32)
    tried = []
    for part in range(16, 33):
        scale = (np.abs(groups).max(1, keepdims=True) * np.float32(part / 32)) / np.float32(7.5)
        scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
        tried.append(((np.clip(np.rint(groups / scale), -8, 7) * scale - groups) ** 2).sum(1))
    found = errors(fake_quantize(x, fitted, "row"))
    np.testing.assert_allclose(found, np.min(tried, 0), rtol=1e-5)
    assert found.sum() < 0.95 * errors(fake_quantize(x, plain, "row")).sum()
    for name in ("nvfp4", "mxfp4"):
        of = [errors(fake_quantize(x, SCHEMES[n].weights, "row")) for n in (f"{name}_mse", name)]
        assert (of[0] <= of[1]).all()
        assert of[0].sum() < of[1].sum()


@pytest.mark.parametrize("fmt", BLOCKED.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (130, 257), (2, 3, 5, 64)])
def test_blocks_there_and_back(fmt: Format, shape: tuple[int, ...]) -> None:
    """Whatever the sizes, every element comes back to its place, and a part is rounded as it is in the whole."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(from_blocks(blocks_of(x, fmt), fmt, x.shape), x)
    whole = fake_quantize(x, fmt, "row")
    rows = fmt.block[0]
    first = fake_quantize(x[..., :rows, :], fmt, "row", share=share_of(x, fmt))
    assert torch.equal(first, whole[..., :rows, :])


@pytest.mark.parametrize(
    "scheme", [s for s in SCHEMES.values() if s.activations], ids=lambda s: s.name
)
def test_a_token_rounds_alike_in_any_batch(scheme: Scheme) -> None:
    """What lies beside a token in a batch, thousands of times larger, moves nothing of it: keys leave the batch out."""
    assert scheme.activations is not None
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    beside = torch.cat([x, 3e3 * torch.randn(4, 256, generator=torch.Generator().manual_seed(4))])
    alone = rounded(x[:1], scheme.activations, "row")
    assert torch.equal(alone, rounded(beside, scheme.activations, "row")[:1])


def test_odd_numbers() -> None:
    """Infinities and NaN stay in their block; zeros, and all subnormals, come back as zeros."""
    for fmt in (*BLOCKED.values(), FORMATS["int8"]):
        zeros = fake_quantize(torch.tensor([[0.0, -0.0, 1e-40, 0.0]]).repeat(2, 64), fmt, "row")
        assert not zeros.any()
        if fmt.by_blocks and fmt.scale != "e4m3":  # whose scales are the whole tensor's
            x = torch.ones(1, 512)
            x[0, 0] = torch.inf
            alone = fake_quantize(torch.ones(1, 512), fmt, "row")
            assert torch.equal(fake_quantize(x, fmt, "row")[0, 256:], alone[0, 256:])


def test_names_and_mistakes() -> None:
    """Names are read as people write them; blocks have no columns' scales; a variance is not claimed of blocks."""
    assert get_scheme("NVFP4").name == get_scheme(" nvfp4 ").name == "nvfp4"
    assert get_scheme("FP8-E4M3").weights is FORMATS["fp8_e4m3"]
    assert [mac_time(n, "fp32") for n in ("nvfp4", "w4a8", "w4a16", "bf16")] == [
        0.25,
        0.5,
        2.0,
        1.0,
    ]
    with pytest.raises(MpqError, match=r"Unknown format 'nvfp5': expected one of .*nvfp4"):
        get_scheme("nvfp5")
    with pytest.raises(MpqError, match="has blocks along rows"):
        fake_quantize(torch.ones(4, 4), BLOCKED["nvfp4"], "column")
    spec = {
        "model": {"path": "m"},
        "calibration": {"source": "t.txt"},
        "objectives": {"m": {"formats": ["nvfp4"]}},
        "noise_model": "ulp",
    }
    with pytest.raises(
        MpqError, match=r"noise_model: ulp knows no variance of nvfp4.*expected actual"
    ):
        parse_spec(spec)


def test_the_page_is_written_from_the_table() -> None:
    """docs/formats.md is what `make docs` would write now."""
    assert (ROOT / "docs" / "formats.md").read_text(encoding="utf-8") == page(), "run `make docs`"
