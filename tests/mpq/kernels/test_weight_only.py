"""Weights alone on a CPU: packed and decoded, they are what rounding makes of them, and decoding tokens read fewer bytes."""

from __future__ import annotations

import pytest
import torch
from small import small_model

from mpq.formats.scheme import get_scheme
from mpq.kernels import emulated, native_formats, weight_only
from mpq.running.apply import apply_plan

SCHEMES = [f for f in native_formats("cpu") if get_scheme(f).activations is None]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 256), (97, 128)])
def test_as_rounded(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """One row, few and many, with a bias and moved scales: the product of the rounded weight, to a step of the output's dtype."""
    torch.manual_seed(0)
    scheme = get_scheme(name)
    weight, bias = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype), torch.randn(shape[0])
    want = emulated.linear(weight, bias.to(dtype), scheme, perturb_weight=1.01)
    found = weight_only.linear(weight, bias.to(dtype), scheme.weights, 1.01)
    step = 8 * torch.finfo(dtype).eps
    for rows in (1, 5, weight_only.FEW):
        x = torch.randn(2, rows, shape[1]).to(dtype)
        torch.testing.assert_close(
            found(x), want(x), rtol=0, atol=step * float(want(x).abs().max())
        )
        assert found(x, torch.float32).dtype == torch.float32


def test_fp16_holds_what_codes_would_not() -> None:
    """In FP16 the product is finite where the sum of codes, before their scale, is larger than its largest value."""
    scheme = get_scheme("w8a16")
    weight, x = torch.full((16, 1024), 0.01).half(), torch.ones(1, 1024).half()
    found = weight_only.linear(weight, None, scheme.weights)(x)
    torch.testing.assert_close(found, torch.full((1, 16), 10.24).half(), rtol=1e-2, atol=0)


def test_a_plan_runs_natively() -> None:
    """A model in them gives the logits of the emulated plan, and comes out as it went in."""
    model = small_model("llama", dtype=torch.bfloat16, hidden_size=128, intermediate_size=128)
    of = {"q_proj": "w8a16", "o_proj": "w4a16", "k_proj": "w4a16_mse"}
    plan = {f"model.layers.0.self_attn.{op}": f for op, f in of.items()}
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        before = model(tokens).logits
        logits = {}
        for backend in ("native", "emulated"):
            with apply_plan(model, plan, base="bf16", backend=backend):
                logits[backend] = model(tokens).logits
        assert torch.equal(model(tokens).logits, before)
    largest = float(before.abs().max())
    torch.testing.assert_close(logits["native"], logits["emulated"], rtol=0, atol=0.02 * largest)
    assert not torch.equal(logits["native"], before)
