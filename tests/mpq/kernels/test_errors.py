"""The sums over rounding errors in C++ against their definition in FP64, on every format and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpq.formats.format import BLOCKED, FORMATS, Format
from mpq.formats.quantize import Granularity, amax_of, binade, fake_quantize
from mpq.kernels import errors
from mpq.kernels.errors import weighted_sums

PLAIN = list(FORMATS.values())
ALL = {"row": [*PLAIN, *BLOCKED.values()], "column": PLAIN}


def defined(g: Tensor, u: Tensor, granularity: Granularity, formats: list[Format]) -> Tensor:
    """Σ g² m² in FP64, of each magnitude by the names of quantize.py."""
    moved = [fake_quantize(u, f, granularity).double() - u.double() for f in formats]
    sizes = [u.double(), binade(u).double(), amax_of(u, granularity).double(), *moved]
    return torch.stack([(g.double().square() * m.square()).sum() for m in sizes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["row", "column"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 3, 17, 64), (2, 130, 33), (70, 129)])
def test_sums_are_those_of_the_definition(
    shape: tuple[int, ...], granularity: Granularity, dtype: torch.dtype
) -> None:
    """Rows a thousand times larger than others, layouts that are not dense, zeros among them."""
    assert errors._library() is not None
    draw = torch.Generator().manual_seed(sum(shape))
    u = torch.randn(shape, generator=draw) * torch.logspace(-2, 1, shape[-2])[:, None]
    u[..., 1:2] = 0
    g = torch.randn(*shape[:-2], shape[-1], shape[-2], generator=draw).transpose(-1, -2)
    u, g = u.to(dtype), g.to(dtype)
    formats = ALL[granularity]
    want = defined(g, u, granularity, formats)
    got = weighted_sums(u, [*formats, None], granularity)(g).squares
    assert got[-1] == 0, "what is left as it is has no error"
    got = got[:-1]
    # FP32's own rounding of q · scale, which a fused multiply-add leaves out
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-13 * float(want[0]))


def test_torch_sums_where_no_cpp_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler the same sums come from torch, kept for several gradients or not."""
    draw = torch.Generator().manual_seed(3)
    u, g = (torch.randn(5, 4, 9, generator=draw) for _ in range(2))
    want = [weighted_sums(u, ALL[how], how)(g) for how in ("row", "column")]  # type: ignore[arg-type]
    monkeypatch.setattr(errors, "_library", lambda: None)
    for often in (False, True):
        for granularity, sums in zip(("row", "column"), want, strict=True):
            got = weighted_sums(u, ALL[granularity], granularity, often=often)(g)  # type: ignore[arg-type]
            torch.testing.assert_close(tuple(got), tuple(sums), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got.squares, sums.squares, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("swept", [True, False], ids=["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signed_sums_are_those_of_the_definition(
    dtype: torch.dtype, swept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Σ g (Q(u) − u) in FP64 for each format; and over the 5 × 129 elements of each of 14 tokens, its square and what that
    has more than the squares' sum, with the square of the same."""
    draw = torch.Generator().manual_seed(4)
    u, g = (torch.randn(5, 14, 129, generator=draw).to(dtype) for _ in range(2))
    formats = PLAIN
    moved = [(fake_quantize(u, f, "row").double() - u.double()) * g.double() for f in formats]
    if not swept:
        monkeypatch.setattr(errors, "_library", lambda: None)
    for often in (False, True):
        sums = weighted_sums(u, [*formats, None], "row", often=often)(g)
        assert [sums.signed[-1], sums.shared[-1], sums.spread[-1]] == [0, 0, 0]
        for i, of in enumerate(moved):
            assert float(sums.signed[i]) == pytest.approx(
                float(of.sum()), abs=1e-4 * float(of.norm())
            )
            more = of.sum((0, 2)).square() - of.square().sum((0, 2))
            assert float(sums.shared[i]) == pytest.approx(
                float(more.sum()), abs=1e-4 * float(of.norm()) ** 2
            )
            assert float(sums.spread[i]) == pytest.approx(float(more.square().sum()), rel=1e-3)
