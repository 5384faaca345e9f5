"""Native and emulated kernels against float64 references, on odd shapes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from mpq.errors import MpqError
from mpq.formats import FORMATS, get_format
from mpq.kernels import check_native, compiler, cpu, device_name, emulated, int8_attention, int8_linear, native_formats, rows

needs_vnni = pytest.mark.skipif(not int8_attention.available(), reason="this CPU has no AVX512-VNNI, or there is no C++ compiler")
SHAPES = [(1, 1, 1), (1, 33, 7), (5, 17, 19), (37, 64, 130), (128, 48, 1)]  # T, K, C


def tensors(t: int, k: int, c: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x (t, k) whose rows differ a hundredfold in size, a weight (c, k) and a bias (c,)."""
    g = torch.Generator().manual_seed(t + k + c)
    x = torch.randn(t, k, generator=g) * torch.logspace(-1, 1, t)[:, None]
    return x.to(dtype), torch.randn(c, k, generator=g).to(dtype), torch.randn(c, generator=g).to(dtype)


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def rounded(x: Tensor, name: str, axis: int = -1) -> np.ndarray:
    """`x` rounded by numpy and ml_dtypes in float64, scaled along `axis` where the format has 8 bits."""
    a = x.double().numpy()
    if name == "int8":
        scale = np.maximum(np.abs(a).max(axis=axis, keepdims=True), 1e-30) / 127
        return np.rint(a / scale) * scale
    dtype = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}[name]  # fmt: skip
    if name in ("fp8_e4m3", "fp8_e5m2"):
        scale = np.abs(a).max(axis=axis, keepdims=True) / FORMATS[name].maximum
        return (a / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale
    return a.astype(dtype).astype(np.float64)


def close(got: Tensor, want: np.ndarray, a: np.ndarray, b: np.ndarray, share: float) -> None:
    """Each element of the product a x b within `share` of the sum of its terms' magnitudes."""
    assert (np.abs(got.double().numpy() - want) <= share * (np.abs(a) @ np.abs(b)) + 1e-12).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_emulated_linear_is_the_product_of_rounded_operands(name: str, shape: tuple[int, int, int]) -> None:
    """x and W rounded by numpy and multiplied in float64; the bias is added as it is."""
    x, weight, bias = tensors(*shape)
    a, b = rounded(x, name), rounded(weight, name).T
    close(emulated.linear(weight, None, get_format(name))(x), a @ b, a, b, 1e-3)
    torch.testing.assert_close(
        emulated.linear(weight, bias, get_format(name))(x), emulated.linear(weight, None, get_format(name))(x) + bias
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "dtype", "share"), [
    ("int8", torch.float32, 1e-3), ("int8", torch.bfloat16, 1e-2), ("bf16", torch.float32, 1e-2), ("fp32", torch.bfloat16, 1e-2),
])  # fmt: skip
def test_native_linear_against_float64(name: str, dtype: torch.dtype, share: float, shape: tuple[int, int, int]) -> None:
    """Each native linear is the float64 product of its rounded operands, up to the rounding of its output, with and without bias."""
    x, weight, bias = tensors(*shape, dtype)
    a, b = rounded(x, name), rounded(weight, name).T
    got = cpu.linear(weight, None, get_format(name))(x)
    assert got.dtype == dtype
    close(got, a @ b, a, b, share)
    # the bias as one more column of the weight, against a column of ones
    with_bias = np.concatenate([a, np.ones((len(a), 1))], 1), np.concatenate([b, bias.double().numpy()[None]])
    close(cpu.linear(weight, bias, get_format(name))(x), with_bias[0] @ with_bias[1], *with_bias, share)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_native_equals_emulated(name: str, shape: tuple[int, int, int]) -> None:
    """What is emulated for accuracy is what the native kernel computes, scales perturbed or not."""
    x, weight, _ = tensors(*shape)
    for perturb in (1.0, 1.04):
        arguments = (weight, None, get_format(name), perturb, perturb)
        native, fake = cpu.linear(*arguments)(x), emulated.linear(*arguments)(x)
        close(native, fake.double().numpy(), x.double().numpy(), weight.T.double().numpy(), 1e-2 if name == "bf16" else 1e-5)


INT8_LINEARS = {
    "onednn": (cpu._onednn_linear, cpu.has_quantized_linear),
    "avx2": (cpu._avx2_linear, int8_linear.available),
    "int_mm": (cpu._int_mm_linear, lambda: True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (250, 77, 145), (3, 2049, 16)])
@pytest.mark.parametrize("name", INT8_LINEARS)
def test_each_int8_linear_equals_the_emulated_one(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Whatever a CPU runs INT8 on (oneDNN, our AVX2 kernel, torch._int_mm), the numbers are the same, in either output dtype."""
    make, usable = INT8_LINEARS[name]
    if not usable():
        pytest.skip(f"this CPU has no INT8 by {name}")
    x, weight, bias = tensors(*shape, dtype)
    fmt = get_format("int8")
    for perturb, added in ((1.0, None), (1.04, bias)):
        got = make(weight, added, fmt, perturb, perturb)
        want = emulated.linear(weight.float(), None if added is None else added.float(), fmt, perturb, perturb)(x.float())
        size = x.double().abs().numpy() @ weight.double().abs().T.numpy() + 1
        for out, share in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            y = got(x, out)
            assert y.dtype == out
            assert (np.abs(y.double().numpy() - want.double().numpy()) <= share * size).all()


def test_what_multiplies_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP32 where an x86 CPU has neither AVX512 nor AVX-NE-CONVERT; itself elsewhere, and on a GPU whatever its host is."""
    old = {"architecture": "x86_64", "avx2": True}
    hosts = [old, old | {"avx512_f": True}, old | {"avx_ne_convert": True}, {"architecture": "aarch64"}, {}]
    found = []
    for has in hosts:
        monkeypatch.setattr(cpu, "features", lambda has=has: has)
        found.append([cpu._computed_in.__wrapped__(dtype, "cpu") for dtype in (torch.bfloat16, torch.float16)])
        assert cpu._computed_in.__wrapped__(torch.bfloat16, "cuda") == torch.bfloat16
    assert found == [[torch.float32, torch.float16], *[[torch.bfloat16, torch.float16]] * 4]
    x, weight, _ = tensors(4, 8, 6)
    made = cpu.linear(weight.to("meta"), None, get_format("bf16"))(x.to("meta"))
    assert made.shape == (4, 6)


def test_int8_of_nothing_and_of_too_much() -> None:
    """No tokens give no rows; a product with more terms than 32 bits can sum is refused."""
    linear = cpu.linear(torch.ones(6, 8), None, get_format("int8"))
    assert linear(torch.ones(2, 0, 8)).shape == (2, 0, 6)
    with pytest.raises(MpqError, match="133,144 terms"):
        int8_linear.pack(torch.zeros(1, 133_145, dtype=torch.int8), torch.ones(1), None)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_without_instructions_is_the_same_product(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU multiplies rounded operands in FP32, linears and attention's products differ by the order of a sum alone."""
    x, weight, bias = tensors(*shape)
    results = []
    for computed in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(cpu, "_computed_in", lambda *_, computed=computed: computed)
        results.append((cpu.linear(weight, bias, get_format("bf16"))(x.clone()), cpu.bgemm(get_format("bf16"))(x, weight.T)))
    size = x.abs() @ weight.T.abs() + bias.abs()
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert ((ours - theirs).abs() <= 1e-2 * size).all()  # torch's own BF16 product rounds its output once more


def test_int8_without_a_kernel_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU of which nothing is known INT8 runs on torch._int_mm, and the log says that it is slow."""
    x, weight, bias = tensors(40, 64, 24)
    want = cpu.linear(weight, bias, get_format("int8"))(x)
    cached = (cpu.has_quantized_linear, int8_linear.available, cpu._say_slow)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    try:
        for function in cached:
            function.cache_clear()
        with caplog.at_level(logging.WARNING):
            got = cpu.linear(weight, bias, get_format("int8"))(x.clone())
    finally:
        for function in cached:
            function.cache_clear()
    assert "torch._int_mm" in caplog.text
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("cached", "use"), [(rows.passes, rows.passes), (int8_linear._library, int8_linear.available)])
def test_int8_without_a_compiler_says_so(
    cached: Any, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where C++ cannot be compiled, torch quantizes the activations and multiplies: the log says so, and INT8 goes on."""
    if not compiler.features().get("avx2"):
        pytest.skip("this CPU has no AVX2")
    x, weight, bias = tensors(40, 64, 24)
    want = cpu.linear(weight, bias, get_format("int8"))(x)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    functions = {cached, use}
    try:
        for function in functions:
            function.cache_clear()  # type: ignore[attr-defined]
        with caplog.at_level(logging.WARNING):
            use()
            got = cpu.linear(weight, bias, get_format("int8"))(x.clone())
    finally:
        for function in functions:
            function.cache_clear()  # type: ignore[attr-defined]
    assert "/no/such/compiler" in caplog.text
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (257, 129), (64, 1024)])
def test_rows_in_cpp_equal_those_in_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Codes, scales and rescaled products are the same bit for bit; a row of zeros has scale 1."""
    x = (seeded(*shape) * torch.logspace(-3, 3, shape[0])[:, None]).to(dtype)
    x[0] = 0
    native, plain = rows.passes(), rows.TorchPasses()
    assert isinstance(native, rows.NativePasses)
    (codes, scale), (plain_codes, plain_scale) = native.quantize(x, 1.03), plain.quantize(x, 1.03)
    assert torch.equal(codes, plain_codes)
    assert torch.equal(scale, plain_scale)
    for bias in (None, seeded(shape[1])):
        torch.testing.assert_close(
            native.rescale(x.clone(), scale, bias),
            plain.rescale(x.clone(), scale, bias),
            rtol=1e-2 if dtype == torch.bfloat16 else 1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_what_was_made_of_an_input_is_not_kept_too_long(name: str) -> None:
    """Two linears share what they make of one tensor; another tensor, and one changed in place, are read anew."""
    x, weight, _ = tensors(12, 20, 9)
    one, two = (cpu.linear(w, None, get_format(name)) for w in (weight, weight.flip(0)))
    torch.testing.assert_close(one(x), two(x).flip(1))
    fresh = one(x * 2)
    x.mul_(2)
    assert torch.equal(one(x), fresh)


def test_int8_rows_do_not_share_a_scale() -> None:
    """A token of zeros gives the bias, and a token a million times larger leaves its neighbours' results bit-equal."""
    x, weight, bias = tensors(6, 32, 16)
    kernel = cpu.linear(weight, bias, get_format("int8"))
    before = kernel(x)
    x[2], x[4] = 0, x[4] * 1e6
    after = kernel(x)
    assert torch.equal(after[2], bias)
    assert torch.equal(after[[0, 1, 3, 5]], before[[0, 1, 3, 5]])


def test_linears_keep_leading_dimensions_and_strides() -> None:
    """(batch, tokens, K) inputs, contiguous or not, give (batch, tokens, C)."""
    x, weight, bias = tensors(12, 20, 9)
    for name in ("bf16", "int8"):
        kernel = cpu.linear(weight, bias, get_format(name))
        want = kernel(x).view(3, 4, 9)
        torch.testing.assert_close(kernel(x.view(3, 4, 20)), want, rtol=1e-2, atol=0.5)
        strided = x.view(3, 4, 20).transpose(0, 1).contiguous().transpose(0, 1)
        torch.testing.assert_close(kernel(strided), want, rtol=1e-2, atol=0.5)  # BF16 rounds once more where it adds a bias apart


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_emulated_attention_against_float64(dtype: torch.dtype, share: float, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """P of each mask, a P changed on the way times V, and fused attention without: written out in float64, two query heads to
    a head of K, all tokens at once and in blocks."""
    t = 37
    query, key, value = (seeded(2, heads, t, width).to(dtype) for heads, width in ((4, 16), (2, 16), (2, 8)))
    blocked = torch.zeros(2, 1, t, t, dtype=torch.bool) if mask == "none" else torch.ones(2, 1, t, t, dtype=torch.bool).triu(1)
    if mask in ("boolean", "additive"):
        blocked[1, :, 1:, 0] = True
    given = {"boolean": ~blocked, "additive": torch.zeros(2, 1, t, t, dtype=dtype).masked_fill(blocked, -1e30)}.get(mask)
    arguments = (query, key, value, given, mask == "causal", 0.3)
    scores = 0.3 * query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3)
    p, v = scores.masked_fill(blocked, -torch.inf).softmax(-1), value.double().repeat_interleave(2, 1)
    weights = torch.arange(t) % 5

    def change(x: Tensor) -> Tensor:
        seen.append(torch.nn.functional.pad(x, (0, t - x.shape[-1])))
        return (x * weights[: x.shape[-1]]).to(dtype)

    for block, blocks in ((emulated.BLOCK, 1), (1, 3)):
        monkeypatch.setattr(emulated, "BLOCK", block)
        seen: list[Tensor] = []
        got = emulated.attention(*arguments, change)
        assert len(seen) == blocks
        assert seen[0].dtype == got.dtype == dtype
        torch.testing.assert_close(torch.cat(seen, 2).double(), p, rtol=share, atol=share / 10)
        torch.testing.assert_close(got.view(2, t, 4, 8).double(), (p * weights @ v).transpose(1, 2), rtol=share, atol=share)
    plain = emulated.attention(*arguments)
    assert plain.dtype == dtype
    torch.testing.assert_close(plain.view(2, t, 4, 8).double(), (p @ v).transpose(1, 2), rtol=share, atol=share)


def test_native_bgemm_in_bf16_against_float64() -> None:
    """BF16 operands, output in the caller's dtype."""
    a, b = seeded(2, 3, 5, 11), seeded(2, 3, 11, 7)
    got = cpu.bgemm(get_format("bf16"))(a, b)
    assert got.dtype == torch.float32
    lhs, rhs = rounded(a, "bf16"), rounded(b, "bf16")
    close(got, lhs @ rhs, lhs, rhs, 1e-2)


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (37, 64, 130), (49, 33, 17)])
def test_int8_bgemm_against_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Rows of the first operand and columns of the second rounded by numpy; the second one contiguous either way, or neither."""
    t, k, n = shape
    a, b = seeded(2, 3, t, k).to(dtype), seeded(2, 3, k, n).to(dtype)
    lhs, rhs = rounded(a, "int8"), rounded(b, "int8", axis=-2)
    for second in (b, b.mT.contiguous().mT, torch.cat([b, b], -1)[..., ::2] * 0 + b.repeat_interleave(2, -1)[..., ::2]):
        got = cpu.bgemm(get_format("int8"))(a, second)
        assert got.dtype == dtype
        close(got, lhs @ rhs, lhs, rhs, 1e-2 if dtype == torch.bfloat16 else 1e-5)


def attention_by_definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> np.ndarray:
    """Float64 attention of operands rounded to INT8 by numpy, P included."""
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    scores = torch.from_numpy(scaling * rounded(q, "int8") @ rounded(k, "int8").swapaxes(-1, -2))
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return rounded(scores.softmax(-1).nan_to_num(0.0), "int8") @ rounded(v, "int8", axis=-2)


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv", "t", "s", "d", "dv"),
    [(1, 1, 1, 1, 1, 1), (4, 2, 37, 37, 17, 5), (3, 1, 50, 61, 64, 64), (2, 2, 130, 97, 33, 48)],
)
def test_int8_attention_against_float64(heads: int, kv: int, t: int, s: int, d: int, dv: int, dtype: torch.dtype) -> None:
    """Odd sizes, grouped heads, transposed layouts, and every kind of mask, against the definition with operands rounded by numpy."""
    q, k, v = (seeded(2, n, h, w).to(dtype).transpose(1, 2) for n, h, w in ((t, heads, d), (s, kv, d), (s, kv, dv)))
    seen = seeded(2, 1, t, s) > -0.5
    seen[..., 0] = True
    for mask, causal in ((None, False), (None, True), (seen, False), (seeded(1, heads, t, s), False)):
        want = attention_by_definition(q, k, v, mask, causal, 0.3)
        got = int8_attention.attention(q, k, v, mask, causal, 0.3).transpose(1, 2).double().numpy()
        # a probability on the edge between two codes may fall to either side: one code of 127 in a row
        edge = 2 / 127 * np.abs(v.double().numpy()).max()
        assert np.abs(got - want).max() <= edge + (1e-2 * np.abs(want).max() if dtype == torch.bfloat16 else 0)
        assert np.sqrt(np.square(got - want).mean()) <= (3e-3 if dtype == torch.bfloat16 else 1e-3) * max(1, np.abs(want).max())


@needs_vnni
def test_int8_attention_of_a_token_that_sees_nothing_is_finite() -> None:
    """A row masked entirely, by False or by the lowest FP32, gives finite numbers and leaves the other rows alone."""
    q, k, v = seeded(1, 1, 3, 8), seeded(1, 1, 3, 8), seeded(1, 1, 3, 8)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    want = int8_attention.attention(q, k, v, mask, False, 1.0)
    mask[..., 1, :] = False
    for blocked in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)):
        got = int8_attention.attention(q, k, v, blocked, False, 1.0)
        assert bool(got.isfinite().all())
        assert torch.equal(got[:, [0, 2]], want[:, [0, 2]])


def test_what_is_native_is_said_and_the_rest_refused() -> None:
    """check_native names the formats that the device can run, per kind of product, and the device when it has none."""
    assert native_formats("cpu", "linear") == ("fp32", "bf16", "int8")
    assert native_formats("cpu", "bgemm")[:2] == ("fp32", "bf16")
    check_native(["int8", "bf16"], "cpu")
    with pytest.raises(MpqError, match=r"fp8_e4m3.*can run fp32, bf16, int8"):
        check_native(["bf16", "fp8_e4m3"], "cpu")
    with pytest.raises(MpqError, match=r"native bgemm in fp8_e5m2.*can run fp32, bf16"):
        check_native(["fp8_e5m2"], "cpu", "bgemm")
    with pytest.raises(MpqError, match="no native kernels"):
        check_native(["bf16"], "tpu:0")
    assert re.search(r"\(.+\), \d+ threads?$", device_name("cpu"))
