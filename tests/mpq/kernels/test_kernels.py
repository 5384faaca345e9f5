"""Native and emulated kernels against float64 references, on odd shapes."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from operands import SHAPES, seeded, tensors
from torch import Tensor

from mpq.devices import check_device
from mpq.errors import MpqError
from mpq.formats.format import FORMATS, get_format
from mpq.formats.scheme import get_scheme
from mpq.kernels import check_native, cpu, device_name, emulated, int8_attention, native_formats
from mpq.kernels.compiler import generation

needs_vnni = pytest.mark.skipif(
    not int8_attention.available(),
    reason="this CPU has no AVX512-VNNI, or there is no C++ compiler",
)


def rounded(x: Tensor, name: str, axis: int = -1) -> np.ndarray:
    """`x` rounded by numpy and ml_dtypes in float64, scaled along `axis` where the format has 8 bits."""
    a = x.double().numpy()
    if name == "int8":
        scale = np.maximum(np.abs(a).max(axis=axis, keepdims=True), 1e-30) / 127
        return np.rint(a / scale) * scale
    dtype = {
        "fp32": np.float32,
        "fp16": np.float16,
        "bf16": ml_dtypes.bfloat16,
        "fp8_e4m3": ml_dtypes.float8_e4m3fn,
        "fp8_e5m2": ml_dtypes.float8_e5m2,
    }[name]
    if name in ("fp8_e4m3", "fp8_e5m2"):
        scale = np.abs(a).max(axis=axis, keepdims=True) / FORMATS[name].maximum
        return (a / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale
    return a.astype(dtype).astype(np.float64)


def close(got: Tensor, want: np.ndarray, a: np.ndarray, b: np.ndarray, share: float) -> None:
    """Each element of the product a x b within `share` of the sum of its terms' magnitudes."""
    assert (np.abs(got.double().numpy() - want) <= share * (np.abs(a) @ np.abs(b)) + 1e-12).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_emulated_linear_is_the_product_of_rounded_operands(
    name: str, shape: tuple[int, int, int]
) -> None:
    """x and W rounded by numpy and multiplied in float64; the bias is added as it is."""
    x, weight, bias = tensors(*shape)
    a, b = rounded(x, name), rounded(weight, name).T
    close(emulated.linear(weight, None, get_scheme(name))(x), a @ b, a, b, 1e-3)
    torch.testing.assert_close(
        emulated.linear(weight, bias, get_scheme(name))(x),
        emulated.linear(weight, None, get_scheme(name))(x) + bias,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "dtype", "share"),
    [
        ("int8", torch.float32, 1e-3),
        ("int8", torch.bfloat16, 1e-2),
        ("bf16", torch.float32, 1e-2),
        ("fp32", torch.bfloat16, 1e-2),
    ],
)
def test_native_linear_against_float64(
    name: str, dtype: torch.dtype, share: float, shape: tuple[int, int, int]
) -> None:
    """Each native linear is the float64 product of its rounded operands, up to the rounding of its output, with and without bias."""
    x, weight, bias = tensors(*shape, dtype)
    a, b = rounded(x, name), rounded(weight, name).T
    got = cpu.linear(weight, None, get_format(name))(x)
    assert got.dtype == dtype
    close(got, a @ b, a, b, share)
    # the bias as one more column of the weight, against a column of ones
    with_bias = (
        np.concatenate([a, np.ones((len(a), 1))], 1),
        np.concatenate([b, bias.double().numpy()[None]]),
    )
    close(
        cpu.linear(weight, bias, get_format(name))(x),
        with_bias[0] @ with_bias[1],
        *with_bias,
        share,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_native_equals_emulated(name: str, shape: tuple[int, int, int]) -> None:
    """What is emulated for accuracy is what the native kernel computes, scales perturbed or not."""
    x, weight, _ = tensors(*shape)
    for perturb in (1.0, 1.04):
        native = cpu.linear(weight, None, get_format(name), perturb, perturb)(x)
        fake = emulated.linear(weight, None, get_scheme(name), perturb, perturb)(x)
        close(
            native,
            fake.double().numpy(),
            x.double().numpy(),
            weight.T.double().numpy(),
            1e-2 if name == "bf16" else 1e-5,
        )


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
        torch.testing.assert_close(
            kernel(strided), want, rtol=1e-2, atol=0.5
        )  # BF16 rounds once more where it adds a bias apart


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_emulated_attention_against_float64(
    dtype: torch.dtype, share: float, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P of each mask, a P changed on the way times V, and fused attention without: written out in float64, two query heads to
    a head of K, all tokens at once and in blocks."""
    t = 37
    query, key, value = (
        seeded(2, heads, t, width).to(dtype) for heads, width in ((4, 16), (2, 16), (2, 8))
    )
    blocked = (
        torch.zeros(2, 1, t, t, dtype=torch.bool)
        if mask == "none"
        else torch.ones(2, 1, t, t, dtype=torch.bool).triu(1)
    )
    if mask in ("boolean", "additive"):
        blocked[1, :, 1:, 0] = True
    given = {
        "boolean": ~blocked,
        "additive": torch.zeros(2, 1, t, t, dtype=dtype).masked_fill(blocked, -1e30),
    }.get(mask)
    arguments = (query, key, value, given, mask == "causal", 0.3)
    scores = 0.3 * query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3)
    p, v = (
        scores.masked_fill(blocked, -torch.inf).softmax(-1),
        value.double().repeat_interleave(2, 1),
    )
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
        torch.testing.assert_close(
            got.view(2, t, 4, 8).double(), (p * weights @ v).transpose(1, 2), rtol=share, atol=share
        )
    plain = emulated.attention(*arguments)
    assert plain.dtype == dtype
    torch.testing.assert_close(
        plain.view(2, t, 4, 8).double(), (p @ v).transpose(1, 2), rtol=share, atol=share
    )


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
    for second in (
        b,
        b.mT.contiguous().mT,
        torch.cat([b, b], -1)[..., ::2] * 0 + b.repeat_interleave(2, -1)[..., ::2],
    ):
        got = cpu.bgemm(get_format("int8"))(a, second)
        assert got.dtype == dtype
        close(got, lhs @ rhs, lhs, rhs, 1e-2 if dtype == torch.bfloat16 else 1e-5)


def attention_by_definition(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scaling: float
) -> np.ndarray:
    """Float64 attention of operands rounded to INT8 by numpy, P included."""
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    scores = torch.from_numpy(scaling * rounded(q, "int8") @ rounded(k, "int8").swapaxes(-1, -2))
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf
        )
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf)
            if mask.dtype == torch.bool
            else scores + mask.double()
        )
    return rounded(scores.softmax(-1).nan_to_num(0.0), "int8") @ rounded(v, "int8", axis=-2)


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv", "t", "s", "d", "dv"),
    [(1, 1, 1, 1, 1, 1), (4, 2, 37, 37, 17, 5), (3, 1, 50, 61, 64, 64), (2, 2, 130, 97, 33, 48)],
)
def test_int8_attention_against_float64(
    heads: int, kv: int, t: int, s: int, d: int, dv: int, dtype: torch.dtype
) -> None:
    """Odd sizes, grouped heads, transposed layouts, and every kind of mask, against the definition with operands rounded by numpy."""
    q, k, v = (
        seeded(2, n, h, w).to(dtype).transpose(1, 2)
        for n, h, w in ((t, heads, d), (s, kv, d), (s, kv, dv))
    )
    seen = seeded(2, 1, t, s) > -0.5
    seen[..., 0] = True
    for mask, causal in (
        (None, False),
        (None, True),
        (seen, False),
        (seeded(1, heads, t, s), False),
    ):
        want = attention_by_definition(q, k, v, mask, causal, 0.3)
        got = int8_attention.attention(q, k, v, mask, causal, 0.3).transpose(1, 2).double().numpy()
        # a probability on the edge between two codes may fall to either side: one code of 127 in a row
        edge = 2 / 127 * np.abs(v.double().numpy()).max()
        assert np.abs(got - want).max() <= edge + (
            1e-2 * np.abs(want).max() if dtype == torch.bfloat16 else 0
        )
        assert np.sqrt(np.square(got - want).mean()) <= (
            3e-3 if dtype == torch.bfloat16 else 1e-3
        ) * max(1, np.abs(want).max())


@needs_vnni
def test_int8_attention_of_a_token_that_sees_nothing_is_finite() -> None:
    """A row masked entirely, by False or by the lowest FP32, gives finite numbers and leaves the other rows alone."""
    q, k, v = seeded(1, 1, 3, 8), seeded(1, 1, 3, 8), seeded(1, 1, 3, 8)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    want = int8_attention.attention(q, k, v, mask, False, 1.0)
    mask[..., 1, :] = False
    for blocked in (
        mask,
        torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
    ):
        got = int8_attention.attention(q, k, v, blocked, False, 1.0)
        assert bool(got.isfinite().all())
        assert torch.equal(got[:, [0, 2]], want[:, [0, 2]])


def test_what_is_native_is_said_and_the_rest_refused() -> None:
    """check_native names the formats that the device can run, per kind of product, and the device when it has none."""
    assert native_formats("cpu", "linear") == (
        *("fp32", "bf16", "int8"),
        *("w8a16", "w4a16", "w4a16_g32", "w4a16_mse", "w4a16_g32_mse"),
    )
    assert native_formats("cpu", "bgemm")[:2] == ("fp32", "bf16")
    check_native(["int8", "bf16"], "cpu")
    with pytest.raises(MpqError, match=r"fp8_e4m3.*can run fp32, bf16, int8"):
        check_native(["bf16", "fp8_e4m3"], "cpu")
    with pytest.raises(MpqError, match=r"native bgemm in fp8_e5m2.*can run fp32, bf16"):
        check_native(["fp8_e5m2"], "cpu", "bgemm")
    with pytest.raises(MpqError, match="Unknown device 'tpu:0'"):
        check_native(["bf16"], "tpu:0")
    assert re.search(r"\(.+\), \d+ threads?$", device_name("cpu"))


def test_generations_of_one_name_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A virtual machine calls every generation the same; other systems say less."""
    text = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\ncpu family\t: 25\nmodel\t\t: 1\n"
    (tmp_path / "cpuinfo").write_text(text)
    assert generation(tmp_path / "cpuinfo") == " family 25 model 1"
    assert generation(tmp_path / "nothing") == ""
    monkeypatch.setattr("mpq.kernels.generation", lambda: " family 25 model 1")
    monkeypatch.setattr("mpq.kernels.features", lambda: {"cpu_name": "AMD EPYC"})
    assert device_name("cpu").startswith("AMD EPYC family 25 model 1 (")


@pytest.mark.parametrize(
    ("device", "build", "count", "words"),
    [
        ("gpu", "13.0", 1, "Unknown device 'gpu': expected cpu, cuda or cuda:N"),
        ("cuda", None, 0, "built for CPUs"),
        ("cuda", "13.0", 0, "no NVIDIA GPU or no driver"),
        ("cuda:2", "13.0", 2, "torch sees 2 GPUs, counted from cuda:0"),
    ],
)
def test_a_device_that_is_not_there_is_told(
    device: str, build: str | None, count: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is no device, this torch knows none, the machine has none, or not that many."""
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for check in (check_device, device_name):
        with pytest.raises(MpqError, match=re.escape(words)):
            check(device)
    check_device("cpu")
    if count:
        check_device(f"cuda:{count - 1}")
