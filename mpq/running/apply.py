"""A plan on a model: the same model running in mixed precision, and back.

Linears (nn.Linear, and GPT-2's Conv1D, whose weight is transposed) get another `forward` on the instance; attention's
products go through attention.intercept, those of experts through experts.intercept_experts. Nothing of the model is changed otherwise: weights stay as they are, so that a
head tied to the embedding leaves the embedding alone, and ops in the base format run what they always ran.

- backend `emulated`: any format, operands rounded and multiplied in the dtype of the model's weights.
- backend `native`: the device's own kernels, for timing. An attention with both products in one 16-bit format runs its
  fused kernel in that format, as users would run it.

Seeds: every operand of every op draws its own multiplier for its scale, by (seed, op, operand) alone, so one op rounds the
same way whatever else is lowered. A multiplier is at least 1, since a smaller scale would clip the largest values.
For floats it is uniform in [1, 2): rounding points repeat from binade to binade, so this covers their positions evenly
(E4M3 keeps 17 of its 18 binades). For integers, whose step grows with the scale, and for floats of few binades (E2M1 has
three), it is uniform in [1, 1.05).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.formats.format import get_format
from mpq.formats.scheme import Scheme, get_scheme
from mpq.formats.scheme import of_kind as fitting
from mpq.kernels import (
    Kind,
    check_native,
    emulated,
    native_kernels,
    weight_only,
)
from mpq.models import experts
from mpq.models.attention import AttentionHandler, intercept
from mpq.models.experts import ExpertProduct, intercept_experts
from mpq.models.graph import OpKind
from mpq.models.linears import is_linear, weight_of
from mpq.models.placement import comes_and_goes, device_of, is_spread, with_forward
from mpq.running.attention import (
    PRODUCTS,
    EmulatedAttention,
    NativeAttention,
    perturbation,
)
from mpq.running.experts import EmulatedExperts, GroupedExperts, NativeExperts

Backend: TypeAlias = Literal["native", "emulated"]
Forward: TypeAlias = Callable[..., Tensor]
_OTHER = (
    "which is a scheme of the cache of K and V",
    "which is a scheme of weights: attention's products take formats with one scale a row, or the cache's",
)


def kind_of(model: nn.Module, op: str) -> OpKind | None:
    """What kind of op of `model` is called `op`, `other` where it is none that can be lowered; None for no part of the model."""
    owner, _, last = op.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    if last in PRODUCTS:
        return "bgemm"
    if experts.dispatched(module) and last in experts.products_of(module):
        return "experts"
    found = getattr(module, last, None)
    return "linear" if isinstance(found, nn.Module) and is_linear(found) else "other"


class Mixed:
    """A model that can be switched between plans, for as long as the object is not closed.

    `base` is the format of the ops that no plan lowers: they run untouched, in the dtype of the weights. Kernels are
    prepared once for each (op, format) and kept, so switching back and forth costs no quantization; the memory of the
    rounded weights is the price. Weights that come and go (models/placement.py) are rounded at every call instead.
    The native backend asks for weights in the base format's dtype. There an op in a 16-bit format leaves its output in it
    where all that read it are lowered, which `feeds` tells (partition.feeds_of).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        base: str,
        backend: Backend = "emulated",
        seed: int | None = None,
        feeds: Mapping[str, tuple[str, ...]] | None = None,
    ):
        self.model = model
        self.base = get_format(base).name
        self.backend = backend
        self.seed = seed
        self._kernels: dict[tuple[str, str], Forward] = {}
        self._products: dict[tuple[str, str], ExpertProduct] = {}
        self._seams = ExitStack()  # what is in linears, attention and experts now
        self._formats: dict[str, str] = {}
        weight = next(model.parameters())
        self._device, self._dtype = device_of(model).type, weight.dtype
        self._feeds = (
            dict(feeds or {}) if backend == "native" and weight.dtype == torch.float32 else {}
        )
        if backend == "native" and is_spread(model):
            raise MpqError(
                f"The model's weights are not all on {self._device}, which is too small for them: bringing them would be timed with it; time it where they fit."
            )
        if backend == "native" and weight.dtype != getattr(torch, get_format(base).dtype):
            raise MpqError(
                f"The model's weights are {weight.dtype}, the base format is {base}: load the model in {base}."
            )

    @property
    def formats(self) -> dict[str, str]:
        """The ops lowered now, and their formats."""
        return dict(self._formats)

    def set(self, formats: Mapping[str, str]) -> None:
        """Run the ops named in `formats` in these formats, all others in base.

        Raises MpqError, and changes nothing, where the model lacks an op or the device a native kernel.
        """
        lowered = {
            op: f for op, name in formats.items() if (f := get_scheme(name).name) != self.base
        }
        kinds = {op: kind_of(self.model, op) for op in formats}
        unknown = [
            op for op, kind in kinds.items() if kind is None or (kind == "other" and op in lowered)
        ]
        if unknown:
            raise MpqError(
                f"The model has no op {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''} ({len(unknown)} of "
                f"{len(formats)} in the plan): make the plan for this architecture."
            )
        of_kind: dict[str, dict[str, str]] = {"linear": {}, "experts": {}, "bgemm": {}}
        for op, name in lowered.items():
            of_kind[str(kinds[op])][op] = name
        for kind, of in of_kind.items():
            if unfit := next((op for op, name in of.items() if not fitting(kind, [name])), None):
                raise MpqError(
                    f"{unfit} cannot run in {of[unfit]}, {_OTHER[kind == 'bgemm']}; pin it to base and solve again."
                )
        for kind, of in of_kind.items() if self.backend == "native" else ():
            check_native(of.values(), self._device, cast(Kind, kind))
        kept = self._kept(lowered)
        kernels = {op: self._linear(op, f) for op, f in of_kind["linear"].items()}
        for op in kernels.keys() & {
            *kept,
            *(reader for producer in kept for reader in self._feeds[producer]),
        }:
            kernels[op] = partial(kernels[op], out=kept.get(op, self._dtype))
        handlers = self._handlers(of_kind["bgemm"], kept)
        products: dict[str, dict[str, ExpertProduct]] = {}
        for op, name in of_kind["experts"].items():
            owner, _, product = op.rpartition(".")
            products.setdefault(owner, {})[product] = self._expert_product(op, name)
        self.clear()
        if handlers:
            self._seams.enter_context(intercept(self.model, handlers))
        if products:
            self._seams.enter_context(intercept_experts(self.model, products))
        for op, kernel in kernels.items():
            self._seams.enter_context(with_forward(self.model.get_submodule(op), kernel))
        self._formats = lowered

    def clear(self) -> None:
        """Take every replacement off: the model runs as it did before."""
        self._seams.close()
        self._formats = {}

    def _kept(self, lowered: Mapping[str, str]) -> dict[str, torch.dtype]:
        """The ops whose output stays in their 16-bit format: it is read as it is, and by lowered ops alone."""
        kept: dict[str, torch.dtype] = {}
        for op, readers in self._feeds.items():
            fmt = get_scheme(lowered.get(op, self.base)).weights
            narrow = fmt.name != self.base and fmt.kind == "float" and fmt.bits == 16
            fused = not _is_product(op) or _both(op, lowered) == fmt.name
            if (
                narrow
                and fused
                and all(
                    _both(r, lowered) == fmt.name if _is_product(r) else r in lowered
                    for r in readers
                )
            ):
                kept[op] = getattr(torch, fmt.dtype)
        return kept

    def _linear(self, op: str, name: str) -> Forward:
        if (op, name) not in self._kernels:
            module = self.model.get_submodule(op)
            scheme, noise = get_scheme(name), self._noise(op, get_scheme(name))

            def make() -> Forward:
                weight, bias = weight_of(module), cast("Tensor | None", module.bias)
                if self.backend == "emulated":
                    return emulated.linear(weight, bias, scheme, **noise)
                if scheme.activations is None:
                    return weight_only.linear(weight, bias, scheme.weights, noise["perturb_weight"])
                # a device's other schemes are alike for both operands
                linear = native_kernels(self._device).linear
                return cast(Forward, linear(weight, bias, scheme.weights, **noise))

            # weights that come and go are rounded each time: all of them would be a model in memory
            again = comes_and_goes(module)
            self._kernels[op, name] = (lambda *x: make()(*x)) if again else make()
        return self._kernels[op, name]

    def _expert_product(self, op: str, name: str) -> ExpertProduct:
        if (op, name) not in self._products:
            owner, _, product = op.rpartition(".")
            native = NativeExperts if self._device == "cpu" else GroupedExperts
            make = EmulatedExperts if self.backend == "emulated" else native
            module, scheme = self.model.get_submodule(owner), get_scheme(name)
            self._products[op, name] = make(module, product, scheme, **self._noise(op, scheme))
        return self._products[op, name]

    def _noise(self, op: str, scheme: Scheme) -> dict[str, float]:
        operands = {"input": scheme.activations, "weight": scheme.weights}
        return {f"perturb_{o}": perturbation(self.seed, op, o, f) for o, f in operands.items()}

    def _handlers(
        self, lowered: Mapping[str, str], kept: Mapping[str, torch.dtype]
    ) -> dict[str, AttentionHandler]:
        chosen: dict[str, dict[str, Scheme]] = {}
        for op, name in lowered.items():
            owner, _, product = op.rpartition(".")
            chosen.setdefault(owner, {})[product] = get_scheme(name)
        handlers: dict[str, AttentionHandler] = {}
        for owner, schemes in chosen.items():
            if self.backend == "emulated":
                handlers[owner] = EmulatedAttention(owner, schemes, self.seed)
                continue
            # a device's own are alike for both operands
            qk, av = (schemes[p].weights if p in schemes else None for p in PRODUCTS)
            out = kept.get(f"{owner}.av_matmul", self._dtype)
            if self._device == "cpu":
                handlers[owner] = NativeAttention(qk, av, out)
            else:
                operands = [
                    (f, p, o)
                    for f, p in zip((qk, av), PRODUCTS, strict=True)
                    for o in ("lhs", "rhs")
                ]
                noise = [
                    1.0 if f is None else perturbation(self.seed, f"{owner}.{p}", o, f)
                    for f, p, o in operands
                ]
                handlers[owner] = native_kernels(self._device).Attention(qk, av, out, noise)
        return handlers


def _is_product(op: str) -> bool:
    return op.rpartition(".")[2] in PRODUCTS


def _both(op: str, lowered: Mapping[str, str]) -> str | None:
    """The format of both products of the attention that `op` is one of, if they have the same."""
    one, other = (lowered.get(f"{op.rpartition('.')[0]}.{product}") for product in PRODUCTS)
    return one if one == other else None


@contextmanager
def apply_plan(
    model: nn.Module,
    formats: Mapping[str, str],
    *,
    base: str,
    backend: Backend = "emulated",
    seed: int | None = None,
    feeds: Mapping[str, tuple[str, ...]] | None = None,
) -> Iterator[nn.Module]:
    """`model` running in `formats` (op → format; a Plan's `formats`) inside the context, as before outside.

    Raises MpqError where the model lacks an op of the plan, or the device a native kernel.
    """
    mixed = Mixed(model, base=base, backend=backend, seed=seed, feeds=feeds)
    try:
        mixed.set(formats)
        yield model
    finally:
        mixed.clear()


applied = apply_plan  # its name before, for one version
