"""INT8 and blocks on a GPU: operands decoded by other means than they were made, products against float64.

Without a GPU Triton's interpreter runs the kernels, and what torch's scaled products would do with the operands is done from their bytes.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cuda_reference import DEVICE, drawn, epsilon, error
from torch import Tensor
from torch.nn.functional import ScalingType

pytest.importorskip("triton", reason="Triton comes for Linux on x86-64 alone")

from mpq.errors import MpqError
from mpq.formats.format import BLOCKED, FORMATS, Format
from mpq.formats.quantize import fake_quantize
from mpq.formats.scheme import SCHEMES
from mpq.kernels import emulated, scaled
from mpq.kernels.block_codes import Operand, quantize_blocks, weights_in_blocks

IN_ROWS = [BLOCKED[name] for name in ("fp8_e4m3_128", "mxfp8", "mxfp4", "nvfp4")]
SHAPES = [(1, 1), (5, 33), (130, 160), (37, 300)]


def straight(scales: Tensor, rows: int, blocks: int) -> Any:
    """Swizzled bytes as (rows, blocks), by the address that cuBLAS's documentation gives each."""
    flat, across = scales.cpu().view(torch.uint8).numpy(), math.ceil(blocks / 4)
    i, j = np.arange(rows)[:, None], np.arange(blocks)
    tile = (i // 128 * across + j // 4) * 512
    return flat[tile + i % 32 * 16 + i % 128 // 32 * 4 + j % 4]


def decoded(operand: Operand, fmt: Format, rows: int) -> Any:
    """What codes and scales stand for, float64 (rows, K up), from their bytes by ml_dtypes."""
    data = operand.codes.cpu().view(torch.uint8).numpy()[:rows]
    if fmt.bits == 4:
        codes = np.stack([data & 15, data >> 4], -1).reshape(rows, -1)
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    else:
        values = data.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    high, columns = fmt.block
    blocks = values.shape[1] // columns
    if fmt.scale == "fp32":
        scale = operand.scales.cpu().double().numpy()
        scale = scale.T if high == 1 else scale.repeat(high, 0)[:rows]
    else:
        kind = {"e8m0": ml_dtypes.float8_e8m0fnu, "e4m3": ml_dtypes.float8_e4m3fn}[fmt.scale]
        scale = straight(operand.scales, rows, blocks).view(kind).astype(np.float64)
        scale *= operand.perturb if fmt.scale == "e8m0" else float(operand.whole)  # type: ignore[arg-type]
    return values * scale.repeat(columns, 1)


def same(found: Any, want: Tensor, perturb: float) -> None:
    """Equal; with perturbed scales equal codes, whose scale is two factors where fake_quantize's is their FP32 product."""
    found = found.astype(np.float32)
    np.testing.assert_allclose(found, want.numpy(), rtol=0 if perturb == 1 else 1e-6, atol=0)


@pytest.mark.parametrize("fmt", IN_ROWS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_the_definition(fmt: Format, dtype: torch.dtype) -> None:
    """Bit for bit fake_quantize's, an empty block, subnormals, an outlier and perturbed scales included; what fills up is zero."""
    for shape in SHAPES:
        x = drawn(*shape)
        x[-1], x[0, :2] = 0, torch.tensor([1e-39, 3e4], device=DEVICE)[: shape[1]]
        x = x.to(dtype)
        for perturb in (1.0, 1.03):
            found = decoded(quantize_blocks(x, fmt, perturb), fmt, shape[0])
            want = fake_quantize(x.float().cpu(), fmt, "row", perturb)
            assert not found[:, shape[1] :].any()
            same(found[:, : shape[1]], want, perturb)


@pytest.mark.parametrize("name", ["fp8_block", "mxfp8", "mxfp4", "nvfp4", "nvfp4_mse", "mxfp4_mse"])
def test_weights_are_those_of_the_definition(name: str) -> None:
    """Bit for bit fake_quantize's, fitted scales and blocks of 128 rows too, however many rows and columns fill up."""
    fmt = SCHEMES[name].weights
    for shape in ((3, 33), (130, 160), (150, 290)):
        weight = drawn(*shape)
        for perturb in (1.0, 1.03):
            operand = weights_in_blocks(weight, fmt, perturb, 16 if fmt.block[0] == 1 else 1)
            found = decoded(operand, fmt, shape[0])
            want = fake_quantize(weight.cpu(), fmt, "row", perturb)
            same(found[:, : shape[1]], want, perturb)


def by_hand(a: Operand, b: Operand, fmt: Format) -> Tensor:
    """What torch's scaled product is to do with the operands, in float64."""
    of_a, of_b = (decoded(o, fmt, len(o.codes)) for o in (a, b))
    return torch.from_numpy(of_a @ of_b.T).to(DEVICE)


@pytest.mark.parametrize("name", ["int8", "fp8_block", "mxfp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(1, 33, 7), (130, 160, 20)])
def test_linears_equal_emulation(
    name: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is emulated for accuracy, with a bias and perturbed scales, in x's dtype and in another one."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (10, 0):
        monkeypatch.setattr(scaled, "scaled", by_hand)
    scheme, (t, k, c) = SCHEMES[name], shape
    for dtype, with_bias, perturb in (
        (torch.float32, False, 1.0),
        (torch.bfloat16, True, 1.0),
        (torch.float32, True, 1.03),
    ):
        x, weight, bias = (drawn(*s, dtype=dtype) for s in ((t, k), (c, k), (1, c)))
        kept = bias[0] if with_bias else None
        run = scaled.linear(weight, kept, scheme.weights, perturb, perturb)
        got = run(x.view(1, t, k))
        want = emulated.linear(
            weight.double(), None if kept is None else kept.double(), scheme, perturb, perturb
        )(x.double())
        assert (got.dtype, got.shape) == (dtype, (1, t, c))
        assert error(got[0], want) < 1e-3 + epsilon(dtype)
        assert run(x, torch.bfloat16).dtype == torch.bfloat16  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_linears_are_one_operation_to_a_compiler(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile takes a linear without a break, and it gives the same numbers."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(scaled, "scaled", by_hand)
    torch.compiler.reset()
    x, run = drawn(5, 33), scaled.linear(drawn(7, 33), None, SCHEMES[name].weights, 1.0, 1.0)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), run(x))


def test_a_product_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch was built without it, in one sentence."""

    def missing(*_: object) -> Tensor:
        raise NotImplementedError("MXFP4 scaling only supported in CUDA for B200/B300\nat Blas")

    monkeypatch.setattr(scaled, "scaled_mm", missing)
    run = scaled.linear(drawn(16, 32), None, BLOCKED["mxfp4"], 1.0, 1.0)
    with pytest.raises(MpqError, match=r"no product in mxfp4 .*B200/B300\): leave it out"):
        run(drawn(3, 32))


def test_integers_are_summed_exactly() -> None:
    """Sums that pass 2^24 on the way, where FP32 would lose units, come back to the last one; halves go to the even code."""
    x = torch.randint(64, 128, (2, 8192), generator=torch.Generator().manual_seed(0))
    weight = torch.randint(64, 128, (3, 8192), generator=torch.Generator().manual_seed(1))
    weight[:, 4096:] *= -1
    x[:, 0] = weight[:, 0] = 127  # scales of exactly 1
    of_x, of_weight = (t.float().to(DEVICE) for t in (x, weight))
    got = scaled.linear(of_weight, None, FORMATS["int8"], 1.0, 1.0)(of_x)
    assert int((x[:, :4096] @ weight[:, :4096].T).max()) > 2**25
    assert torch.equal(got.cpu().long(), x @ weight.T)
    halves = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5]], device=DEVICE)
    codes = scaled.operand(halves, FORMATS["int8"], 1.0).codes[0, :8]
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -2, 64]


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("shape", [(1, 33, 7), (130, 300, 140)])
def test_torch_takes_the_operands(
    name: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own checks of a GPU's scaled product, on tensors without numbers, find shapes, strides and dtypes right.

    Those of MXFP4 (torch 2.13) ask for half the scales that the product itself does.
    """
    called = []

    def on_meta(*given: object) -> Tensor:
        def moved(x: object) -> object:
            if isinstance(x, list):
                return [moved(y) for y in x]
            return x.to("meta") if isinstance(x, Tensor) else x

        called.append(given)
        return torch.nn.functional.scaled_mm(*map(moved, given))  # type: ignore[arg-type]

    monkeypatch.setattr(scaled, "scaled_mm", on_meta)
    t, k, c = shape
    fmt = SCHEMES[name].weights
    held = weights_in_blocks(drawn(c, k), fmt, 1.0, scaled.MULTIPLE)
    y = scaled.scaled(quantize_blocks(drawn(t, k), fmt), held, fmt)
    assert (y.shape, y.dtype) == ((t, math.ceil(c / 16) * 16), torch.bfloat16)
    recipes = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    assert called[0][3] == (recipes if name == "nvfp4" else ScalingType.BlockWise1x32)
