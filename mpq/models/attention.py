"""A seam in attention: the operands and the two products of any architecture, open to whoever measures or lowers them.

Transformers picks each attention's implementation by the name in its configuration. An attention module that gets a
handler is given a private copy of its configuration that names `mpq`, and so is sent here; the model's own
configuration stays as it is. Hence the model makes the mask that it always made, and the attention modules without a
handler run what they always ran (usually fused SDPA, causal without a mask where it can be).

Here the model's OWN eager attention function runs, with its soft caps, sinks and head repetition, under a mode that
catches its two matrix products: the first is Q Kᵀ, the second P V. SDPA's mask (none for plain causal, or booleans) is
turned into the additive one that eager functions take.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from mpq.errors import MpqError
from mpq.models.placement import holding
from mpq.models.seam import NAME, diverted

SUPPORTED = ("eager", "sdpa")  # the implementations whose masks are understood here

AttentionFunction: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class PlainAttention:
    """softmax(scaling · Q Kᵀ + mask) V, as SDPA computes it: query (B, H, T, D), key and value with H_kv heads.

    `mask` (broadcastable to (B, H, T, S)) is boolean, True where attended, or additive; without one, `causal` attention
    is aligned upper left.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scaling: float


class AttentionHandler:
    """What to do in one attention module. This one does nothing: override what is needed.

    Shapes: query (B, H, T, D), key (B, H_kv, S, D), value (B, H_kv, S, D_v), heads not yet repeated; probabilities
    (B, H, T, S). In `qk` and `av` the second operand has its heads repeated: (B, H, D, S) and (B, H, S, D_v).
    """

    #: run the whole attention in this dtype, by the implementation that the model is configured with (fused SDPA where
    #: it has that); then nothing else here is called
    dtype: torch.dtype | None = None
    #: with `dtype`, the dtype of the output; the query's if left out
    out: torch.dtype | None = None
    #: keep no (B, H, T, S) tensor for the backward pass: the products are computed again there, as fused attention does
    recompute = False
    #: with `recompute`, the sample of the batch that the products are of: they come one sample after the other
    sample = 0
    #: leave the heads of the second operands as they are, (B, H_kv, D, S) and (B, H_kv, S, D_v), where the model would repeat them
    grouped = False

    def fused(self, attention: PlainAttention) -> Tensor | None:
        """The whole attention by a kernel of the handler's own, (B, T, H, D_v); None where it has none, then what follows
        is called. Asked only where the model is configured with SDPA, which knows no soft caps and no sinks."""
        return None

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The operands as they shall enter the products, before heads are repeated."""
        return query, key, value

    def probabilities(self, p: Tensor) -> Tensor:
        """The probabilities as they shall enter the second product."""
        return p

    def qk(self, query: Tensor, key_t: Tensor) -> Tensor:
        """The first product, unscaled scores (B, H, T, S)."""
        return torch.matmul(query, key_t)

    def av(self, p: Tensor, value: Tensor) -> Tensor:
        """The second product, (B, H, T, D_v)."""
        return torch.matmul(p, value)


@dataclass(frozen=True)
class _Interception:
    handler: AttentionHandler
    implementation: str  # what the model is configured with
    eager: AttentionFunction
    products: _Products


_ACTIVE = "_mpq_interception"


@contextmanager
def intercept(model: nn.Module, handlers: Mapping[str, AttentionHandler]) -> Iterator[nn.Module]:
    """`model` with a handler in each attention module named in `handlers`, by fully qualified name.

    Leaving the context restores everything; contexts may be nested, the inner handler then stands for the outer.
    Raises MpqError where a name is no attention module that Transformers dispatches, and where the model runs an
    implementation whose masks are not understood here (flash_attention_2, flex_attention, ...).
    """
    prepared = {name: _interception(model, name, handler) for name, handler in handlers.items()}
    of = [(model.get_submodule(name), own) for name, own in prepared.items()]
    with diverted(of, "_attn_implementation_internal", _ACTIVE):
        yield model


def dispatched(module: nn.Module) -> bool:
    """Whether Transformers picks this module's attention by name, so that a handler can be put into it."""
    return _eager_function(module) is not None and _implementation(module) is not None


def _implementation(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _eager_function(module: nn.Module) -> AttentionFunction | None:
    """The eager attention of the file that the module's class, or one that it inherits from, is written in."""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return next((f for m in files if (f := getattr(m, "eager_attention_forward", None))), None)


def _interception(model: nn.Module, name: str, handler: AttentionHandler) -> _Interception:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise MpqError(
            f"The model has no module {name!r}: expected the name of one of its attention modules."
        ) from None
    outer: _Interception | None = module.__dict__.get(_ACTIVE)
    if outer is not None:
        return _Interception(handler, outer.implementation, outer.eager, _Products(handler))
    implementation, eager = _implementation(module), _eager_function(module)
    if implementation is None or eager is None:
        raise MpqError(
            f"{name} ({type(module).__name__}) is no attention module that Transformers dispatches by name."
        )
    if implementation not in SUPPORTED:
        raise MpqError(
            f"{name} runs the attention {implementation!r}, mpq needs one of {', '.join(SUPPORTED)}: "
            "load the model with attn_implementation='sdpa'."
        )
    return _Interception(handler, implementation, eager, _Products(handler))


class _Products(TorchFunctionMode):
    """Catches the two matrix products of an eager attention function."""

    MATMULS = frozenset(
        {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
    )

    def __init__(self, handler: AttentionHandler):
        super().__init__()
        self.handler = handler
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # inside this method the mode is off: the handler's own products are not caught
        if func not in self.MATMULS:
            return func(*args, **(kwargs or {}))
        self.count += 1
        if self.count == 1:
            return self.handler.qk(*args)
        return self.handler.av(self.handler.probabilities(args[0]), *args[1:])


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered as `mpq`."""
    interception: _Interception = module._mpq_interception  # type: ignore[assignment]
    handler = interception.handler
    if handler.dtype is not None:
        return _attend_in(interception, module, query, key, value, attention_mask, kwargs)
    if interception.implementation == "sdpa" and kwargs.get("position_bias") is None:
        causal = attention_mask is None and query.shape[2] > 1 and _is_causal(module, kwargs)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        output = handler.fused(PlainAttention(query, key, value, attention_mask, causal, scaling))
        if output is not None:
            return output, None
    query, key, value = handler.operands(query, key, value)
    if interception.implementation != "eager":
        attention_mask = additive_mask(query, key, attention_mask, _is_causal(module, kwargs))

    # what else comes for each sample: (B, H, T, S) biases, (B, H, T, 1) sinks
    beside = {k: t for k, t in kwargs.items() if isinstance(t, Tensor) and t.ndim == 4}

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *more: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        products = interception.products
        products.count = 0
        with products, _unrepeated(module, handler.grouped):
            given = kwargs | dict(zip(beside, more, strict=True))
            result = interception.eager(module, query, key, value, mask, **given)
        if products.count != 2:
            raise MpqError(
                f"The attention of {type(module).__name__} makes {products.count} matrix products, mpq expects 2."
            )
        return result

    if not handler.recompute:
        return attend(query, key, value, attention_mask, *beside.values())

    own = {n: p for n, p in module._parameters.items() if p is not None}  # sinks

    def alone(sample: int, *operands: Any) -> Tensor:
        handler.sample = sample
        with holding(module, own):
            return attend(*operands)[0]

    # one sample after the other, or the backward pass would hold several (B, H, T, S) tensors at once
    rows = []
    for i in range(len(query)):
        operands = (
            t[i : i + 1] if t is not None and len(t) > 1 else t
            for t in (query, key, value, attention_mask, *beside.values())
        )
        rows.append(checkpoint(partial(alone, i), *operands, use_reentrant=False))
    output = torch.cat(rows)
    return output, None


@contextmanager
def _unrepeated(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Within, if `wanted`, the module's eager function repeats no heads: it asks the module how often."""
    groups = module.__dict__.get("num_key_value_groups")
    if not wanted or groups is None:
        yield
        return
    module.__dict__["num_key_value_groups"] = 1
    try:
        yield
    finally:
        module.__dict__["num_key_value_groups"] = groups


def _attend_in(
    interception: _Interception,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The configured attention with its operands cast to the handler's dtype, the output cast back."""
    dtype = interception.handler.dtype
    assert dtype is not None  # the caller has seen to it
    if mask is not None and mask.is_floating_point():
        # the smallest FP32 becomes -inf in BF16, and a row that is masked entirely would turn into NaN
        mask = mask.clamp(min=torch.finfo(dtype).min).to(dtype)
    function: AttentionFunction = ALL_ATTENTION_FUNCTIONS.get_interface(
        interception.implementation, interception.eager
    )
    output, weights = function(
        module, query.to(dtype), key.to(dtype), value.to(dtype), mask, **kwargs
    )
    return output.to(interception.handler.out or query.dtype), weights


def _is_causal(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether no mask means causal attention: the rule of SDPA's implementation."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def additive_mask(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """SDPA's mask as the additive one of eager attention: 0 where attended, the dtype's lowest value elsewhere.

    No mask stands for plain `causal` attention (aligned upper left) or, where it is not or a single token asks, for full
    attention: the rule by which SDPA's implementation reads it.
    """
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        length, total = query.shape[-2], key.shape[-2]
        if not causal or length == 1:
            return None
        blocked = torch.ones(length, total, dtype=torch.bool, device=query.device).triu(1)
        return torch.zeros(1, 1, length, total, dtype=query.dtype, device=query.device).masked_fill(
            blocked, lowest
        )
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
            ~mask, lowest
        )
    return mask


AttentionInterface.register(NAME, _attend)
# for the odd module that makes its own mask from its own configuration
AttentionMaskInterface.register(NAME, eager_mask)
