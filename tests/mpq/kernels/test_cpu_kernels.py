"""Which kernel a CPU gets for INT8 and BF16, that all of them give the same numbers, and what is said where the fast one is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from operands import SHAPES, seeded, tensors

from mpq.errors import MpqError
from mpq.formats.format import get_format
from mpq.formats.scheme import get_scheme
from mpq.kernels import compiler, cpu, emulated, int8_linear, rows

INT8_LINEARS = {
    "onednn": (cpu._onednn_linear, cpu.has_quantized_linear),
    "avx2": (cpu._avx2_linear, int8_linear.available),
    "int_mm": (cpu._int_mm_linear, lambda: True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (250, 77, 145), (3, 2049, 16)])
@pytest.mark.parametrize("name", INT8_LINEARS)
def test_each_int8_linear_equals_the_emulated_one(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Whatever a CPU runs INT8 on (oneDNN, our AVX2 kernel, torch._int_mm), the numbers are the same, in either output dtype."""
    make, usable = INT8_LINEARS[name]
    if not usable():
        pytest.skip(f"this CPU has no INT8 by {name}")
    x, weight, bias = tensors(*shape, dtype)
    fmt = get_format("int8")
    for perturb, added in ((1.0, None), (1.04, bias)):
        got = make(weight, added, fmt, perturb, perturb)
        want = emulated.linear(
            weight.float(),
            None if added is None else added.float(),
            get_scheme("int8"),
            perturb,
            perturb,
        )(x.float())
        size = x.double().abs().numpy() @ weight.double().abs().T.numpy() + 1
        for out, share in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            y = got(x, out)
            assert y.dtype == out
            assert (np.abs(y.double().numpy() - want.double().numpy()) <= share * size).all()


def test_what_multiplies_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP32 where an x86 CPU has neither AVX512 nor AVX-NE-CONVERT; itself elsewhere, and on a GPU whatever its host is."""
    old = {"architecture": "x86_64", "avx2": True}
    hosts = [
        old,
        old | {"avx512_f": True},
        old | {"avx_ne_convert": True},
        {"architecture": "aarch64"},
        {},
    ]
    found = []
    for has in hosts:
        monkeypatch.setattr(cpu, "features", lambda has=has: has)
        found.append(
            [
                cpu._computed_in.__wrapped__(dtype, "cpu")
                for dtype in (torch.bfloat16, torch.float16)
            ]
        )
        assert cpu._computed_in.__wrapped__(torch.bfloat16, "cuda") == torch.bfloat16
    assert found == [[torch.float32, torch.float16], *[[torch.bfloat16, torch.float16]] * 4]
    x, weight, _ = tensors(4, 8, 6)
    monkeypatch.setattr(cpu, "_computed_in", cpu._computed_in.__wrapped__)
    monkeypatch.setattr(cpu, "features", lambda: old)
    multiplied: list[torch.dtype] = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b: multiplied.append(w.dtype) or linear(x, w, b)
    )
    for device in ("cpu", "meta"):  # meta stands for any other device
        cpu.linear(weight.to(device), None, get_format("bf16"))(x.to(device))
    assert multiplied == [torch.float32, torch.bfloat16]


def test_int8_of_nothing_and_of_too_much() -> None:
    """No tokens give no rows; a product with more terms than 32 bits can sum is refused."""
    linear = cpu.linear(torch.ones(6, 8), None, get_format("int8"))
    assert linear(torch.ones(2, 0, 8)).shape == (2, 0, 6)
    with pytest.raises(MpqError, match="133,144 terms"):
        int8_linear.pack(torch.zeros(1, 133_145, dtype=torch.int8), torch.ones(1), None)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_without_instructions_is_the_same_product(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a CPU multiplies rounded operands in FP32, linears and attention's products differ by the order of a sum alone."""
    x, weight, bias = tensors(*shape)
    results = []
    for computed in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(cpu, "_computed_in", lambda *_, computed=computed: computed)
        results.append(
            (
                cpu.linear(weight, bias, get_format("bf16"))(x.clone()),
                cpu.bgemm(get_format("bf16"))(x, weight.T),
            )
        )
    size = x.abs() @ weight.T.abs() + bias.abs()
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (
            (ours - theirs).abs() <= 1e-2 * size
        ).all()  # torch's own BF16 product rounds its output once more


def test_int8_without_a_kernel_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
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


@pytest.mark.parametrize(
    ("cached", "use"), [(rows.passes, rows.passes), (int8_linear._library, int8_linear.available)]
)
def test_int8_without_a_compiler_says_so(
    cached: Any,
    use: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
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
