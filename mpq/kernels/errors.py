"""What rounding a tensor does to a loss whose gradient is known, for every format in one sweep.

On a CPU the sweep is C++ (errors.cpp). Elsewhere, and where no C++ can be compiled, torch does it with
rounding.rounded, whose results are the definition of the error: Q_f(u) − u at the scales of an emulated kernel.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mpq.formats.format import Format
from mpq.formats.quantize import Granularity, amax_of, binade, fake_quantize, share_of
from mpq.kernels.compiler import compiled
from mpq.kernels.grid import GridFormat, described
from mpq.kernels.rounding import rounded

log = logging.getLogger(__name__)

MAGNITUDES = 3  # the sums before the formats': of u², of its squared binade, of its largest


class Sums(NamedTuple):
    """What a gradient g of a tensor u (…, T, K) makes of u's magnitudes m and its formats' errors e; float64.

    `squares` (3 + formats,) is Σ (g m)², e among the m. Of each format, (formats,): `signed` Σ g e; `shared`, Σ_t of
    s_t = (Σ g e)² − Σ (g e)², both over all that belongs to token t, which is what its errors add by having signs in common;
    `spread`, Σ_t s_t², the variance of `shared` where they have not.
    """

    squares: Tensor
    signed: Tensor
    shared: Tensor
    spread: Tensor


_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def weighted_sums(
    u: Tensor,
    formats: Sequence[Format | None],
    granularity: Granularity,
    *,
    often: bool = False,
    shares: Sequence[float] | None = None,
) -> Callable[[Tensor], Sums]:
    """A function of a gradient of u's shape (…, T, K): its Sums.

    The magnitudes are u, 2^floor(log2|u|), the largest |u| of the element's row or column; a format's error is Q_f(u) − u,
    and 0 for None, which leaves u as it is. By columns nothing is `shared`: their sums are not a token's. `often` says
    that several gradients come: then torch keeps the magnitudes between them. `shares` are quantize.share_of the tensor
    in each format, where u is a part of it; u's own if left out. Of a format whose blocks have several rows, u has whole
    blocks of the tensor.
    """
    column = granularity == "column"
    # a column's neighbourhood is a row of the transpose
    u = u.detach().transpose(-1, -2) if column else u.detach()
    shares = shares or shares_of(u, formats)
    if u.device.type == "cpu" and u.dtype in _SUFFIX and u.numel() and _library():
        sweeps = _sweeps(u, formats, shares)

        def swept(g: Tensor) -> Sums:
            by_row = _swept(g.transpose(-1, -2) if column else g, sweeps, len(formats))
            return _of_rows(by_row, u.shape[-2], column)

        return swept
    kept = list(_magnitudes(u, formats, shares)) if often else None

    def sums(g: Tensor) -> Sums:
        g = (g.transpose(-1, -2) if column else g).float()
        by_row = []
        for magnitude in kept if kept is not None else _magnitudes(u, formats, shares):
            moved = g * magnitude
            signed = moved.sum(-1)
            by_row.append(torch.stack([moved.square_().sum(-1), signed], -1))
        return _of_rows(torch.stack(by_row, -1).flatten(0, -3), u.shape[-2], column)

    return sums


def _of_rows(by_row: Tensor, tokens: int, column: bool) -> Sums:
    """The Sums of rows (…·tokens, 2, 3 + formats): squares, and products with their sign."""
    by_row = by_row.double()
    squares, signed = by_row.sum(0)
    of_formats = by_row[..., MAGNITUDES:].unflatten(0, (-1, tokens)).sum(0)  # (tokens, 2, formats)
    shared = of_formats[:, 1].square() - of_formats[:, 0]
    shared = torch.zeros_like(shared) if column else shared
    return Sums(squares, signed[MAGNITUDES:], shared.sum(0), shared.square().sum(0))


def shares_of(u: Tensor, formats: Sequence[Format | None]) -> list[float]:
    """quantize.share_of a tensor in each format."""
    return [1.0 if f is None else share_of(u, f) for f in formats]


def _magnitudes(
    u: Tensor, formats: Sequence[Format | None], shares: Sequence[float]
) -> Iterator[Tensor]:
    yield u.float()
    yield binade(u)
    yield amax_of(u, "row")
    for fmt, share in zip(formats, shares, strict=True):
        if fmt is None:
            yield torch.zeros(1, device=u.device)
        elif fmt.by_blocks:
            yield fake_quantize(u, fmt, "row", share=share).float() - u.float()
        else:
            yield rounded(u, fmt, "row").float() - u.float()


@dataclass(frozen=True)
class _Sweep:
    """Formats, at `places` among all, whose errors one sweep over `u` (…, T, K) sums; without any, `u` is an error itself."""

    u: Tensor
    formats: object
    shares: Tensor
    places: list[int]


def _sweeps(u: Tensor, formats: Sequence[Format | None], shares: Sequence[float]) -> list[_Sweep]:
    """One sweep for all formats, and one more for each whose scales are fitted, or one of the whole tensor."""
    own = str(u.dtype).removeprefix("torch.")
    # those that round a tensor of this dtype at all
    rounding = [
        (i, f)
        for i, f in enumerate(formats)
        if f and (f.needs_scale or (f.bits <= 16 and f.dtype != own))
    ]
    rest = [(i, f) for i, f in rounding if f.fit == "max" and not f.of_tensor]
    described_ = (GridFormat * len(rest))(*(described(f) for _, f in rest))
    of_rest = torch.tensor([shares[i] for i, _ in rest])
    sweeps = [_Sweep(u.contiguous(), described_, of_rest, [i for i, _ in rest])]
    for i, f in rounding:
        if f.fit != "max" or f.of_tensor:
            error = fake_quantize(u, f, "row", share=shares[i]).float() - u.float()
            sweeps.append(_Sweep(error.contiguous(), None, torch.empty(0), [i]))
    return sweeps


def _swept(g: Tensor, sweeps: Sequence[_Sweep], count: int) -> Tensor:
    """Of every row (rows, 2, 3 + count): the squares, and the products with their sign."""
    first = _summed(g, sweeps[0])
    by_row = first.new_zeros(len(first), 2, MAGNITUDES + count)
    by_row[..., :MAGNITUDES] = first[..., :MAGNITUDES]
    by_row[..., [MAGNITUDES + i for i in sweeps[0].places]] = first[..., MAGNITUDES:]
    for sweep in sweeps[1:]:
        by_row[..., MAGNITUDES + sweep.places[0]] = _summed(g, sweep)[..., 0]
    return by_row


def _summed(g: Tensor, sweep: _Sweep) -> Tensor:
    u = sweep.u
    g, (rows, k) = g.to(u.dtype).contiguous(), u.shape[-2:]
    count = len(sweep.places) if sweep.formats is not None else 0
    library = _library()
    assert library is not None  # the caller has seen to it
    # a row's sums each to itself, and not one for all: threads add in no order of their own
    by_row = torch.empty(u.numel() // k, 2, MAGNITUDES + count)
    formats = None if sweep.formats is None else ctypes.byref(sweep.formats)  # type: ignore[arg-type]
    run = getattr(library, f"sums_{_SUFFIX[u.dtype]}")
    sizes = (len(by_row) // rows, rows, k)
    how = (formats, sweep.shares.data_ptr(), count)
    run(g.data_ptr(), u.data_ptr(), *sizes, *how, by_row.data_ptr())
    return by_row


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = compiled(Path(__file__).with_name("errors.cpp"))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "Sensitivity is summed by torch, and slowly, since C++ cannot be compiled here: %s",
            error,
        )
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for suffix in _SUFFIX.values():
        entry = getattr(library, f"sums_{suffix}")
        formats = [pointer, pointer, ctypes.c_int32]
        entry.argtypes = [pointer, pointer, size, size, size, *formats, pointer]
    return library
