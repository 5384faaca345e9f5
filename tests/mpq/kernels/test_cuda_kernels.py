"""CUDA's kernels against float64 references on odd shapes: on the GPU where there is one, else on Triton's interpreter.

Without a GPU, torch._scaled_mm is that of the CPU; test_kernels_compile_for_hopper says what the kernels compile to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cuda_reference import DEVICE, E4M3, drawn, epsilon, error
from small import ROOT
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes for Linux on x86-64 alone")

from mpq.formats.format import get_format
from mpq.formats.quantize import fake_quantize
from mpq.formats.scheme import SCHEMES
from mpq.kernels import bgemm, cuda, emulated, flash, fp8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1),
    (1, 33, 7),
    (5, 17, 19),
    (37, 64, 130),
    (128, 48, 1),
]  # T, K, C, as for the CPU's kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (37, 130), (3, 4100), (2, 20000)])
def test_rows_are_quantized_as_emulation_does(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Codes times scales are the values that quantize.py rounds to, a row of zeros too; the padding is zero."""
    x = drawn(*shape, dtype=dtype)
    x[-1] = 0
    for name, perturb in (("fp8_e4m3", 1.7), ("fp8_e5m2", 1.0), ("int8", 1.0)):
        codes, scale = fp8.quantize_rows(x, get_format(name), 16, perturb)
        assert codes.shape == (shape[0], -(-shape[1] // 16) * 16)
        assert not codes.float()[:, shape[1] :].any()
        got, want = (
            codes.float()[:, : shape[1]] * scale[:, None],
            fake_quantize(x.float(), get_format(name), "row", perturb),
        )
        # in the middle between two values x / scale and x · (1 / scale) may fall to either side
        assert (got != want).float().mean() < 2e-3
        assert ((got - x.float()).abs() <= (want - x.float()).abs() * (1 + 1e-4)).all()


def test_strided_rows_and_columns() -> None:
    """Heads taken out of (B, S, H, D) are quantized where they lie; columns come out transposed, one scale each."""
    x = drawn(2, 7, 3, 20).transpose(1, 2)
    codes, scale = fp8.quantize_rows(x, E4M3, 64)
    assert codes.shape == (2, 3, 7, 64)
    torch.testing.assert_close(
        codes.float()[..., :20] * scale[..., None], fake_quantize(x, E4M3, "row")
    )
    for length in (1, 7, 300):
        x = drawn(2, length, 3, 20).transpose(1, 2)
        codes, scale = fp8.quantize_columns(x, E4M3, 64)
        assert codes.shape == (2, 3, 20, -(-length // 64) * 64)
        assert not codes.float()[..., length:].any()
        want = fake_quantize(x, E4M3, "column").transpose(-1, -2)
        torch.testing.assert_close(codes.float()[..., :length] * scale[..., None], want)


def test_a_given_scale_is_taken_and_clips() -> None:
    """With a scale given beforehand every row has it, and values beyond its reach become the format's maximum."""
    x = torch.tensor([[1.0, -5000.0], [0.5, 7.0]], device=DEVICE)
    codes, scale = fp8.quantize_rows(x, E4M3, scale=torch.tensor(2.0, device=DEVICE))
    assert scale.tolist() == [2, 2]
    assert codes.float()[:, :2].tolist() == [[0.5, -448], [0.25, 3.5]]


def test_every_value_is_rounded_to_the_nearest() -> None:
    """FP32 values between all neighbours of E4M3, subnormals and ties included, are cast as torch casts them."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    values = torch.cat(
        [codes, middles, middles * (1 - 1e-6), middles * (1 + 1e-6), torch.tensor([448.0])]
    )
    x = torch.cat([values, -values]).to(DEVICE)
    one = torch.tensor(1.0, device=DEVICE)
    got = fp8.quantize_rows(x[None], E4M3, scale=one)[0][0, : len(x)]
    assert torch.equal(got.float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_equals_emulation(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """FP8 linears are what is emulated for accuracy, with and without bias and perturbed scales, in x's dtype."""
    t, k, c = shape
    x, weight, bias = (
        drawn(t, k, dtype=dtype),
        drawn(c, k, dtype=dtype),
        drawn(1, c, dtype=dtype)[0],
    )
    for with_bias in (None, bias):
        for perturb in (1.0, 1.3):
            got = cuda.linear(weight, with_bias, E4M3, perturb, perturb)(x)
            assert (got.dtype, got.shape) == (dtype, (t, c))
            want = emulated.linear(
                weight.double(),
                None if with_bias is None else with_bias.double(),
                SCHEMES["fp8_e4m3"],
                perturb,
                perturb,
            )(x.double())
            assert error(got, want) < 4e-3 + epsilon(dtype)  # Hopper's fast accumulation


def test_linear_scales_by_tensor_and_static() -> None:
    """One scale for a tensor, dynamic or given, is what quantize.py rounds to with it; E5M2 activations meet E4M3 weights."""
    x, weight = drawn(37, 50), drawn(23, 50)
    wide = fake_quantize(weight.double(), E4M3, "tensor")
    got = cuda.linear(weight, None, E4M3, granularity="tensor")(x)
    assert error(got, fake_quantize(x.double(), E4M3, "tensor") @ wide.T) < 4e-3
    rounded = (x.double() / 0.1).clamp(-448, 448).to(torch.float8_e4m3fn).double() * 0.1
    assert (
        error(
            cuda.linear(weight, None, E4M3, granularity="tensor", input_scale=0.1)(x),
            rounded @ wide.T,
        )
        < 4e-3
    )
    rows = fake_quantize(weight.double(), E4M3, "row")
    assert error(cuda.linear(weight, None, E4M3, input_scale=0.1)(x), rounded @ rows.T) < 4e-3
    e5m2 = get_format("fp8_e5m2")
    assert (
        error(cuda.linear(weight, None, e5m2)(x), fake_quantize(x.double(), e5m2, "row") @ rows.T)
        < 4e-3
    )
    assert (
        error(cuda.linear(weight, None, get_format("bf16"))(x), x.double() @ weight.double().T)
        < 1e-2
    )


def test_linear_keeps_leading_dimensions_and_compiles() -> None:
    """(batch, tokens, K) inputs, contiguous or not, give (batch, tokens, C); torch.compile gives the same numbers."""
    x, weight, bias = drawn(12, 20), drawn(9, 20), drawn(1, 9)[0]
    kernel = cuda.linear(weight, bias, E4M3)
    want = kernel(x).view(3, 4, 9)
    assert torch.equal(kernel(x.view(3, 4, 20)), want)
    assert torch.equal(kernel(x.view(3, 4, 20).transpose(0, 1).contiguous().transpose(0, 1)), want)
    torch.testing.assert_close(
        torch.compile(kernel, backend="aot_eager", fullgraph=True)(x.view(3, 4, 20)),
        want,
        rtol=1e-3,
        atol=1e-3,
    )


def test_linears_share_their_codes() -> None:
    """Two linears that read one tensor quantize it once; a tensor changed in place is read anew."""
    x, weight = drawn(12, 20), drawn(9, 20)
    one, two = (cuda.linear(w, None, E4M3) for w in (weight, weight.flip(0)))
    assert torch.equal(one(x), two(x).flip(1))
    fresh = one(x * 2)
    x.mul_(2)
    assert torch.equal(one(x), fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "t", "n", "k"), [(1, 1, 1, 1, 1), (6, 2, 37, 45, 20), (4, 4, 130, 7, 150)]
)
def test_batched_product_against_float64(
    heads: int, kv_heads: int, t: int, n: int, k: int, dtype: torch.dtype
) -> None:
    """Rows of the first operand and columns of the second rounded to E4M3, heads shared, whichever way the second one lies."""
    a, b = drawn(2, heads, t, k, dtype=dtype), drawn(2, kv_heads, n, k, dtype=dtype)
    lhs, rhs = (fake_quantize(x.double(), E4M3, "row") for x in (a, b))
    want = lhs @ rhs.repeat_interleave(heads // kv_heads, 1).mT
    for second in (b.mT, b.mT.contiguous()):
        got = bgemm.matmul(a, second, E4M3)
        assert got.dtype == dtype
        assert error(got, want) < 4e-3 + epsilon(dtype)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk: str | None,
    av: str | None,
    causal: bool,
    mask: Tensor | None,
    perturb: Any = (1, 1, 1, 1),
) -> Tensor:
    """Attention in float64 from rounded Q, K and V, and P rounded as the kernel would with all keys in one tile."""
    q, k = (
        x if qk is None else fake_quantize(x, get_format(qk), "row", p)
        for x, p in ((q, perturb[0]), (k, perturb[1]))
    )
    v = v if av is None else fake_quantize(v, get_format(av), "column", perturb[3])
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q.double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.double()
    if causal:
        s = s.masked_fill(
            torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf
        )
    p = (s - s.amax(-1, keepdim=True)).exp().nan_to_num()
    total = p.sum(-1, keepdim=True).clamp(min=1e-300)
    if av is not None:
        p = fake_quantize(p, get_format(av), "row", perturb[2])
    return ((p / total) @ v).transpose(1, 2)


HEADS = [  # batch, heads, heads of K and V, queries, keys, head dimension, that of V
    (2, 4, 2, 37, 37, 20, 20),
    (1, 2, 1, 1, 33, 64, 64),
    (1, 2, 2, 300, 300, 64, 64),
    (1, 1, 1, 70, 150, 200, 72),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize(
    ("qk", "av"),
    [
        ("fp8_e4m3", "fp8_e4m3"),
        ("fp8_e4m3", None),
        (None, "fp8_e4m3"),
        ("bf16", "fp8_e4m3"),
        ("fp8_e4m3", "fp16"),
        (None, None),
    ],
)
def test_fused_attention_against_float64(
    qk: str | None, av: str | None, shape: tuple[int, ...], causal: bool
) -> None:
    """Each choice of formats is softmax attention of the rounded operands; where P is rounded, tile by tile, errors have its size."""
    batch, heads, kv_heads, t, s, d, d_v = shape
    q, k, v = (
        torch.randn(batch, n, h, w, generator=torch.Generator().manual_seed(n + h + w))
        .to(DEVICE)
        .transpose(1, 2)
        for n, h, w in ((t, heads, d), (s, kv_heads, d), (s, kv_heads, d_v))
    )
    got = flash.attention(
        q,
        k,
        v,
        qk and get_format(qk),
        av and get_format(av),
        scaling=d**-0.5,
        causal=causal,  # type: ignore[arg-type]
    )
    assert got.shape == (batch, t, heads, d_v)
    one_tile = s <= 64
    tolerance = {"fp16": 5e-4, "fp8_e4m3": 4e-3 if one_tile else 0.03, None: 1e-5}[av]
    assert error(got, reference(q, k, v, qk, av, causal, None)) < tolerance
    assert error(got, reference(q, k, v, None, None, causal, None)) < (
        0.08 if "fp8_e4m3" in (qk, av) else 1e-2
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_attention_in_16_bits(dtype: torch.dtype) -> None:
    """16-bit operands, a product left in the operands' own format, output in their dtype."""
    q, k, v = (
        torch.randn(1, h, 150, 64, generator=torch.Generator().manual_seed(h)).to(DEVICE, dtype)
        for h in (4, 2, 2)
    )
    for qk, av in ((E4M3, None), (None, E4M3), (E4M3, E4M3)):
        got = flash.attention(q, k, v, qk, av, scaling=0.125, causal=True)
        assert got.dtype == dtype
        want = reference(
            q.float(), k.float(), v.float(), qk and qk.name, av and av.name, True, None
        )
        assert error(got, want) < (0.03 if av else 8 * epsilon(dtype))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize(("qk", "av"), [("fp8_e4m3", "fp8_e4m3"), ("fp8_e4m3", None)])
def test_fused_attention_with_masks(qk: str, av: str | None, kind: str) -> None:
    """Masks broadcast over batch and heads; a row that attends to nothing gives zeros."""
    q, k, v = (
        torch.randn(2, h, 50, 32, generator=torch.Generator().manual_seed(h)).to(DEVICE)
        for h in (4, 2, 2)
    )
    mask = torch.rand(2, 1, 50, 50, generator=torch.Generator().manual_seed(5)).to(DEVICE) > 0.3
    mask[0, 0, 3] = False
    given = (
        mask
        if kind == "boolean"
        else torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, -torch.inf)
    )
    got = flash.attention(
        q,
        k,
        v,
        get_format(qk),
        av and get_format(av),
        scaling=32**-0.5,
        causal=False,
        mask=given,  # type: ignore[arg-type]
    )
    assert not got[0, 3].any()
    assert error(got, reference(q, k, v, qk, av, False, mask)) < (4e-3 if av else 1e-5)
    bias = torch.randn(1, 4, 50, 50, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    got = flash.attention(q, k, v, E4M3, None, scaling=32**-0.5, causal=False, mask=bias)
    assert error(got, reference(q, k, v, "fp8_e4m3", None, False, bias)) < 1e-5


def test_perturbed_scales_draw_other_errors_of_the_same_size() -> None:
    """Multipliers of the four scales move the rounding points as emulation moves them."""
    q, k, v = (
        torch.randn(1, 2, 50, 32, generator=torch.Generator().manual_seed(s)).to(DEVICE)
        for s in range(3)
    )
    perturb = (1.1, 1.3, 1.6, 1.9)
    plain, moved = (
        flash.attention(q, k, v, E4M3, E4M3, scaling=32**-0.5, causal=True, perturb=p)
        for p in ((1.0,) * 4, perturb)
    )
    assert not torch.equal(plain, moved)
    assert error(moved, reference(q, k, v, "fp8_e4m3", "fp8_e4m3", True, None, perturb)) < 4e-3


def test_kernels_compile_for_hopper() -> None:
    """For compute capability 9.0 each product becomes Hopper's FP8 or INT8 matrix instruction; all fit into registers and shared memory."""
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    told = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "hopper.py")],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    ).stdout
    kernels = [json.loads(line) for line in told.splitlines()]
    from hopper import SHARED

    for kernel in kernels:
        assert kernel["shared"] <= SHARED, kernel
        assert kernel["stack"] + kernel["local"] <= 64, kernel  # bytes that a thread spills
        lowered = (
            [kernel.get("qk"), kernel.get("av")].count("fp8_e4m3")
            if kernel["kernel"] == "_attention_kernel"
            else 1
        )
        if kernel.get("of") == "torch.int8":
            assert any("wgmma" in m and ".s32.s8.s8" in m for m in kernel["matrix"]), kernel
        elif kernel["kernel"] in ("_attention_kernel", "_product_kernel", "_grouped_kernel"):
            assert any("wgmma" in m and ".e4m3.e4m3" in m for m in kernel["matrix"]), kernel
            assert any("bf16" in m for m in kernel["matrix"]) == (
                lowered == 1 and kernel["kernel"] == "_attention_kernel"
            ), kernel
    assert {k["kernel"] for k in kernels} == {
        "_rows_kernel",
        "_columns_kernel",
        "_attention_kernel",
        "_product_kernel",
        "_grouped_kernel",
        "_blocks_kernel",
    }
