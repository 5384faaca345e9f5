"""INT8 for attention's products on a CPU with VNNI: each product alone, and the whole attention with both (int8_attention.cpp).

    bgemm      a (..., T, K) x b (..., K, N) -> (..., T, N)      a scale for each row of a and each column of b
    attention  Q, K, V, mask -> (B, T, H, D_v)                   scores, softmax and codes of P never leave the cache

The whole attention is the one that gains: a product alone needs P in memory, and leaves the fused attention that base runs.
Heads of K and V are not repeated. Inputs are FP32 or BF16; both are compiled once with the machine's own compiler.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from mpq.kernels.compiler import compiled, features

log = logging.getLogger(__name__)

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


@functools.cache
def available() -> bool:
    """Whether this CPU has VNNI and the kernels could be compiled; the reason why not is said in the log."""
    if not features().get("avx512_vnni"):
        return False
    try:
        _library()
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "Attention's products have no INT8 here, since C++ cannot be compiled: %s", error
        )
        return False
    return True


@functools.cache
def _library() -> ctypes.CDLL:
    library = compiled(Path(__file__).with_suffix(".cpp"))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for suffix in _SUFFIX.values():
        getattr(library, f"bgemm_{suffix}").argtypes = [pointer, pointer, *[size] * 7, pointer]
        getattr(library, f"attention_{suffix}").argtypes = [*[pointer] * 7, size, ctypes.c_float]
    return library


def _bgemm(a: Tensor, b: Tensor) -> Tensor:
    dtype = a.dtype if a.dtype in _SUFFIX else torch.float32
    (t, k), n = a.shape[-2:], b.shape[-1]
    lhs, rhs = a.to(dtype).contiguous(), b.to(dtype).reshape(-1, k, n)
    if 1 not in rhs.stride()[1:]:
        rhs = rhs.contiguous()
    y = torch.empty(*a.shape[:-1], n, dtype=dtype)
    function = getattr(_library(), f"bgemm_{_SUFFIX[dtype]}")
    function(lhs.data_ptr(), rhs.data_ptr(), len(rhs), t, k, n, *rhs.stride(), y.data_ptr())
    return y.to(a.dtype)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float
) -> Tensor:
    dtype = query.dtype if query.dtype in _SUFFIX else torch.float32
    q, k, v = (_last_contiguous(t.to(dtype)) for t in (query, key, value))
    (batch, heads, t, d), (kv_heads, s), d_v = q.shape, k.shape[1:3], v.shape[-1]
    if mask is not None:
        mask = additive(mask).expand(batch, heads, t, s)
    y = torch.empty(batch, t, heads, d_v, dtype=dtype)
    sizes = torch.tensor([batch, heads, kv_heads, t, s, d, d_v])
    strides = torch.tensor(
        [
            n
            for tensor in (q, k, v, mask)
            for n in (tensor.stride()[:3] if tensor is not None else (0, 0, 0))
        ]
    )
    pointers = [
        None if tensor is None else tensor.data_ptr()
        for tensor in (q, k, v, mask, y, sizes, strides)
    ]
    getattr(_library(), f"attention_{_SUFFIX[dtype]}")(*pointers, int(causal), scaling)
    return y.to(query.dtype)


def additive(mask: Tensor) -> Tensor:
    """A mask as FP32 that is added to the scores; a boolean one is True where attended. Its last dimension is contiguous."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return _last_contiguous(mask.float())


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# torch.compile takes each for one operation; called without it, an operator of Python's would cost more than the wrapper above
_bgemm_op = torch.library.custom_op("mpq::int8_bgemm", _bgemm, mutates_args=())
_attention_op = torch.library.custom_op("mpq::int8_attention", _attention, mutates_args=())


@_bgemm_op.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


@_attention_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


def bgemm(a: Tensor, b: Tensor) -> Tensor:
    """`a` (..., T, K) x `b` (..., K, N) with both rounded to INT8, in a's dtype; leading dimensions are equal."""
    return _bgemm_op(a, b) if torch.compiler.is_compiling() else _bgemm(a, b)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float
) -> Tensor:
    """softmax(scaling · Q Kᵀ + mask) V with both products in INT8, (B, T, H, D_v) in query's dtype.

    query (B, H, T, D), key (B, H_kv, S, D), value (B, H_kv, S, D_v); `mask` as additive() takes it, broadcast to
    (B, H, T, S); `causal`: token i attends to tokens 0..i.
    """
    return (_attention_op if torch.compiler.is_compiling() else _attention)(
        query, key, value, mask, causal, scaling
    )
