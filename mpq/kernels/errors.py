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

import torch
from torch import Tensor

from mpq.formats.format import Format
from mpq.formats.quantize import Granularity, amax_of, binade, fake_quantize, share_of
from mpq.kernels.compiler import compiled
from mpq.kernels.grid import GridFormat, described
from mpq.kernels.rounding import rounded

log = logging.getLogger(__name__)

MAGNITUDES = 3  # the sums before the formats': of u², of its squared binade, of its largest
Sums = Callable[[Tensor], Tensor]

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def weighted_sums(
    u: Tensor,
    formats: Sequence[Format | None],
    granularity: Granularity,
    *,
    often: bool = False,
    signed: bool = False,
    shares: Sequence[float] | None = None,
) -> Sums:
    """A function of a gradient g of u's shape (…, T, K): Σ (g m)² of each magnitude m of u.

    It returns (3 + formats,) float64: the magnitudes are u, 2^floor(log2|u|), the largest |u| of
    the element's row or column, and Q_f(u) − u for each format; for None, which leaves u as it is, 0.
    With `signed`, (2, 3 + formats): behind the squares, Σ g (Q_f(u) − u) of each format, where
    magnitudes have no use for a sign. `often` says that several gradients come: then torch keeps
    the magnitudes between them. `shares` are quantize.share_of the tensor in each format, where u is
    a part of it; u's own if left out. Of a format whose blocks have several rows, u has whole blocks
    of the tensor.
    """
    column = granularity == "column"
    # a column's neighbourhood is a row of the transpose
    u = u.detach().transpose(-1, -2) if column else u.detach()
    shares = shares or shares_of(u, formats)
    if u.device.type == "cpu" and u.dtype in _SUFFIX and u.numel() and _library():
        sweeps = _sweeps(u, formats, shares)

        def swept(g: Tensor) -> Tensor:
            both = _swept(g.transpose(-1, -2) if column else g, sweeps, len(formats))
            return both if signed else both[0]

        return swept
    kept = list(_magnitudes(u, formats, shares)) if often else None

    def sums(g: Tensor) -> Tensor:
        g = (g.transpose(-1, -2) if column else g).float()
        squares, with_sign = [], [torch.zeros((), device=u.device)] * MAGNITUDES
        for i, magnitude in enumerate(
            kept if kept is not None else _magnitudes(u, formats, shares)
        ):
            moved = g * magnitude
            if signed and i >= MAGNITUDES:
                with_sign.append(moved.sum())
            squares.append(moved.square_().sum())
        return (
            torch.stack([*squares, *with_sign]).double().view(2, -1)
            if signed
            else torch.stack(squares).double()
        )

    return sums


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
    sums = torch.zeros(2, MAGNITUDES + count, dtype=torch.float64)
    for sweep in sweeps:
        found = _summed(g, sweep)
        if sweep.formats is None:
            sums[:, MAGNITUDES + sweep.places[0]] = found[:, 0]
        else:
            sums[0, :MAGNITUDES] = found[0, :MAGNITUDES]
            sums[:, [MAGNITUDES + i for i in sweep.places]] = found[:, MAGNITUDES:]
    return sums


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
    return by_row.sum(0, dtype=torch.float64)


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
