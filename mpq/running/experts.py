"""A layer's experts in a format: rounded and multiplied in the weights' dtype, by a CPU's own linears, one an expert, or by a GPU's
product of them all.

Scales are those of linears: for each token, and for each output channel or block of each expert, which is a weight of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpq.formats.scheme import Scheme
from mpq.kernels import native_kernels
from mpq.kernels.rounding import rounded
from mpq.models.experts import ExpertProduct, Routing, with_bias
from mpq.models.placement import comes_and_goes


class RoundedInput(ExpertProduct):
    """An experts' product whose rows alone are rounded, as the activations of a scheme are."""

    def __init__(
        self, module: nn.Module, name: str, scheme: Scheme, perturb_input: float = 1.0
    ) -> None:
        super().__init__(module, name)
        self._format, self._perturb = scheme.activations, perturb_input

    def operand(self, x: Tensor, routing: Routing | None) -> Tensor:
        return x if self._format is None else rounded(x, self._format, "row", self._perturb)


class EmulatedExperts(RoundedInput):
    """An experts' product with its operands rounded as `scheme` stores them, the weights once, or at every call where they
    come and go; the bias stays as it is.

    `perturb_*` multiply the scales before rounding (quantize.fake_quantize).
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        scheme: Scheme,
        perturb_input: float = 1.0,
        perturb_weight: float = 1.0,
    ) -> None:
        super().__init__(module, name, scheme, perturb_input)
        self._weights, self._perturb_weight = scheme.weights, perturb_weight
        self._kept = None if comes_and_goes(module) else self._rounded()

    def _rounded(self) -> Tensor:
        """(experts, C, K)."""
        each = (
            rounded(w, self._weights, "row", self._perturb_weight) for w in self.weight.detach()
        )
        return torch.stack(list(each))

    def product(self, x: Tensor, routing: Routing) -> Tensor:
        lowered = self._rounded() if self._kept is None else self._kept
        return with_bias(self.multiply(x, lowered.mT, routing), self.bias, routing)


class NativeExperts(ExpertProduct):
    """An experts' product on the device's linear kernels, one expert after the other: those that got no token cost nothing.

    It stays out of torch.compile, which would make a version for each number of tokens that an expert gets.
    """

    def __init__(self, module: nn.Module, name: str, scheme: Scheme, **perturb: float) -> None:
        super().__init__(module, name)
        weight, bias = self.weight.detach(), self.bias
        linear = native_kernels(weight.device.type).linear
        self._linears = [
            linear(
                w.contiguous(),
                None if bias is None else bias[e].detach(),
                scheme.weights,
                **perturb,
            )
            for e, w in enumerate(weight)
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def product(self, x: Tensor, routing: Routing) -> Tensor:
        y = x.new_empty(len(x), self.weight.shape[1])
        for expert, rows in routing.of_experts():
            y[rows] = self._linears[expert](x[rows])
        return y


class GroupedExperts(ExpertProduct):
    """An experts' product on a GPU, all experts at once (kernels/grouped.py): the host never asks how many tokens one gets."""

    def __init__(self, module: nn.Module, name: str, scheme: Scheme, **perturb: float) -> None:
        super().__init__(module, name)
        weight = self.weight.detach()
        self._rows_of_all = native_kernels("cuda").experts(weight, scheme.name, **perturb)

    def product(self, x: Tensor, routing: Routing) -> Tensor:
        return with_bias(self._rows_of_all(x, routing.ends), self.bias, routing)
