"""Taps on the operands of a model's products: in a backward pass each sees the gradient through that use alone.

The gradients are per sample. An activation's come out of one backward pass of Σ_i g_i as they are: sample i's loss does
not reach the others' activations. A weight's are formed from the output gradient and the input, G_iᵀ X_i, a slice of
rows at a time, weighed and dropped; an expert's from those of the sample's tokens that were sent to it. Parameters never ask for gradients, so beyond the stored activations nothing is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.formats.quantize import Granularity
from mpq.formats.scheme import Operand, Scheme
from mpq.kernels.errors import MAGNITUDES, shares_of, weighted_sums
from mpq.loss.cross_entropy import differentiable_input
from mpq.models.attention import AttentionHandler, intercept
from mpq.models.experts import ExpertProduct, Routing, intercept_experts, with_bias
from mpq.models.linears import weight_of
from mpq.models.placement import is_spread, with_forward

# elements of a weight whose gradients are formed together: on a CPU they stay in its cache
_SLICE = {"cpu": 2**20}
_SLICE_ELSEWHERE = 2**23


class Tally:
    """Sums over samples, by loss and (op, operand), of what kernels.errors.weighted_sums gives for each sample.

    float64, and all by loss:

    - `sums[loss][op, operand]` (2, 3 + schemes): Σ_i v_i and Σ_i v_i² of the squares v;
    - `shared[loss][op, operand]` (3, schemes), of activations: Σ_i w_i and Σ_i w_i² of w, the squares with what signs in common
      add, and Σ of its `spread`;
    - `tokens[loss][op]` (experts,) int64: how many tokens each expert of an op got;
    - `effects[loss][op]`, for each batch that ran through the op: the number of its first sample, and (samples, schemes)
      Σ_n ∂g_i/∂w_n (Q(w_n) − w_n), what rounding the op's weight does to each sample's loss in first order;
    - `done[loss]`: how many samples there were.
    """

    def __init__(self, schemes: Sequence[Scheme]) -> None:
        self.schemes = tuple(schemes)
        # what each scheme rounds each operand to
        self._formats = {o: [s.rounds(o) for s in schemes] for o in get_args(Operand)}
        self._block = max((f.block[0] for f in self._formats["weight"] if f), default=1)
        self.sums: dict[str, dict[tuple[str, str], Tensor]] = defaultdict(dict)
        self.shared: dict[str, dict[tuple[str, str], Tensor]] = defaultdict(dict)
        self.tokens: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.effects: dict[str, dict[str, list[tuple[int, Tensor]]]] = defaultdict(dict)
        self.done: dict[str, int] = defaultdict(int)
        self.samples = 0  # of the batch in flight
        self._batch: dict[tuple[str, str], Tensor] = {}
        self._shared: dict[tuple[str, str], Tensor] = {}
        self._effects: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    @contextmanager
    def of(self, loss: str, samples: int, passes: int = 1) -> Iterator[None]:
        """Within, a backward pass of the losses of a batch of `samples`, called `loss`; of several
        `passes` each sample's values are the means."""
        self.samples, self._batch, self._shared = samples, {}, {}
        self._effects, self._tokens = {}, {}
        yield
        of_loss, of_tokens = self.sums[loss], self.tokens[loss]
        for op, counts in self._tokens.items():
            once = counts // passes  # every pass counts the same ones
            of_tokens[op] = of_tokens[op] + once if op in of_tokens else once
        for where, values in self._batch.items():
            values /= passes
            both = torch.stack([values.sum(0), values.square().sum(0)]).cpu()
            of_loss[where] = of_loss[where] + both if where in of_loss else both
            if where in self._shared:
                shared, spread = self._shared[where].cpu().unbind(1)
                whole = values[:, MAGNITUDES:].cpu() + shared / passes
                three = torch.stack(
                    [whole.sum(0), whole.square().sum(0), spread.sum(0) / passes**2]
                )
                before = self.shared[loss]
                before[where] = before[where] + three if where in before else three
        for op, effects in self._effects.items():
            here = (self.done[loss], effects.cpu() / passes)
            self.effects[loss].setdefault(op, []).append(here)
        self.done[loss] += samples

    def add(self, op: str, operand: str, sample: int, squares: Tensor) -> None:
        """Add what a gradient of sample number `sample` of the batch gives."""
        if (op, operand) not in self._batch:
            self._batch[op, operand] = squares.new_zeros(self.samples, len(squares))
        self._batch[op, operand][sample] += squares

    def add_each(
        self,
        op: str,
        operand: Operand,
        how: Granularity,
        gradient: Tensor,
        u: Tensor,
        first: int = 0,
    ) -> None:
        """Add what ∂g/∂u (samples, …, T, K) of samples from number `first` on gives, one after the other: temporaries
        stay small."""
        formats = self._formats[operand]
        for i, (g, of_u) in enumerate(zip(gradient, u, strict=True), first):
            sums = weighted_sums(of_u, formats, how)(g)
            self.add(op, operand, i, sums.squares)
            if (op, operand) not in self._shared:
                self._shared[op, operand] = sums.shared.new_zeros(self.samples, 2, len(formats))
            self._shared[op, operand][i] += torch.stack([sums.shared, sums.spread])

    def add_weight(
        self, op: str, weight: Tensor, each: Sequence[tuple[int, Tensor, Tensor]]
    ) -> None:
        """Add what ∂g_i/∂W of a weight (C, K) gives, of `each` sample (i, output's gradient (T, C), input (T, K))."""
        rows = max(1, _SLICE.get(weight.device.type, _SLICE_ELSEWHERE) // weight.shape[1])
        rows += -rows % self._block  # whole blocks
        formats = self._formats["weight"]
        how: dict[str, Any] = {"often": len(each) > 1, "shares": shares_of(weight, formats)}
        for start in range(0, len(weight), rows):
            some = slice(start, start + rows)
            sums_of = weighted_sums(weight[some], formats, "row", **how)
            for i, g, u in each:
                sums = sums_of(g[:, some].T @ u)  # [c, T] @ [T, K] -> [c, K]
                self.add(op, "weight", i, sums.squares)
                if op not in self._effects:
                    self._effects[op] = sums.signed.new_zeros(self.samples, len(self.schemes))
                self._effects[op][i] += sums.signed

    def add_tokens(self, op: str, counts: Tensor) -> None:
        """Count the tokens (experts,) that the experts of `op` got."""
        counts = counts.long().cpu()
        self._tokens[op] = self._tokens[op] + counts if op in self._tokens else counts


class _Tap(torch.autograd.Function):
    """Identity whose backward pass hands the gradient through this use of the operand, and u (samples, …, T, K), to `add`."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(u)
        ctx.add = add
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (u,) = ctx.saved_tensors
        ctx.add(gradient, u)
        return gradient, None


class _TappedLinear(torch.autograd.Function):
    """x Wᵀ + b whose backward pass tallies the input's gradient and the weight's per-sample gradients.

    x (rows, K), weight (C, K); `tally.samples` divides the rows into samples.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tally: Tally, op: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.where = (tally, op)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tally, op = ctx.where
        through = gradient @ weight  # [rows, C] @ [C, K] -> [rows, K]
        inputs = x.reshape(tally.samples, -1, x.shape[-1])
        tally.add_each(op, "input", "row", through.view_as(inputs), inputs)
        outputs = gradient.reshape(tally.samples, -1, gradient.shape[-1])
        each = [(i, g, u) for i, (g, u) in enumerate(zip(outputs, inputs, strict=True))]
        tally.add_weight(op, weight, each)
        return through, None, None, None, None


class _TappedRows(torch.autograd.Function):
    """Identity whose backward pass tallies the gradient of the rows that enter an experts' product.

    Tokens (N, K), or with a routing (S, K) sorted by expert; `tally.samples` divides tokens into samples.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tally: Tally, op: str, routing: Routing | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.where = (tally, op, routing)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        tally, op, routing = ctx.where
        rows = (gradient, x) if routing is None else map(routing.by_token, (gradient, x))
        g, u = (t.reshape(tally.samples, -1, t.shape[-1]) for t in rows)
        tally.add_each(op, "input", "row", g, u)
        return gradient, None, None, None


class _TappedExperts(torch.autograd.Function):
    """An experts' product (S, K) -> (S, C) whose backward pass tallies each expert's per-sample gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tally: Tally, op: str, of: ExpertProduct, routing: Routing
    ) -> Tensor:
        weight = of.weight
        ctx.save_for_backward(x, weight)
        ctx.where = (tally, op, of, routing)
        return of.multiply(x, weight.mT, routing)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tally, op, of, routing = ctx.where
        gradient = gradient.contiguous()
        sample = routing.order // (
            len(routing.order) // tally.samples
        )  # tokens come sample by sample
        for expert, rows in routing.of_experts():
            belongs, g, u = sample[rows], gradient[rows], x[rows]
            each = [(i, g[belongs == i], u[belongs == i]) for i in belongs.unique().tolist()]
            tally.add_weight(op, weight[expert], each)
        tally.add_tokens(op, torch.diff(routing.ends, prepend=routing.ends.new_zeros(1)))
        through = of.multiply(
            gradient, weight, routing
        )  # [S, C] by [C, K] of each expert -> [S, K]
        return through, None, None, None, None


class _TappedProduct(ExpertProduct):
    """Taps on the two operands of one of a layer's experts' products."""

    def __init__(self, module: nn.Module, name: str, tally: Tally, op: str) -> None:
        super().__init__(module, name)
        self.tally, self.op = tally, op

    def operand(self, x: Tensor, routing: Routing | None) -> Tensor:
        return _TappedRows.apply(x, self.tally, self.op, routing)  # type: ignore[no-any-return]

    def product(self, x: Tensor, routing: Routing) -> Tensor:
        y = _TappedExperts.apply(x, self.tally, self.op, self, routing)
        return with_bias(y, self.bias, routing)


class _TappedAttention(AttentionHandler):
    """Taps on the four operands of an attention's two products, K and V before their heads are repeated."""

    recompute = True

    def __init__(self, tally: Tally, name: str) -> None:
        self.tally, self.qk_name, self.av_name = tally, f"{name}.qk_matmul", f"{name}.av_matmul"

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self._tap(query, self.qk_name, "lhs", "row"),
            self._tap(key, self.qk_name, "rhs", "row"),
            self._tap(value, self.av_name, "rhs", "column"),
        )

    def probabilities(self, p: Tensor) -> Tensor:
        add = partial(self.tally.add_each, self.av_name, "lhs", "row", first=self.sample)
        return _Tap.apply(p, add)  # type: ignore[no-any-return]

    def _tap(self, u: Tensor, op: str, operand: Operand, how: Granularity) -> Tensor:
        return _Tap.apply(u, partial(self.tally.add_each, op, operand, how))  # type: ignore[no-any-return]


@contextmanager
def tapped(model: nn.Module, ops: Sequence[tuple[str, str]], tally: Tally) -> Iterator[None]:
    """Tap the named ops, (name, kind) each; the model computes what it did before. Taken off on leaving.

    Raises MpqError for an op that the model does not have.
    """
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        handlers: dict[str, AttentionHandler] = {}
        products: dict[str, dict[str, ExpertProduct]] = {}
        for name, kind in ops:
            owner, _, product = (name, "", "") if kind == "linear" else name.rpartition(".")
            if owner not in modules:
                raise MpqError(
                    f"The model has no op {name!r}: partition this model and use the names from its groups table."
                )
            if kind == "bgemm":
                handlers[owner] = _TappedAttention(tally, owner)
            elif kind == "experts":
                of_module = products.setdefault(owner, {})
                of_module[product] = _TappedProduct(modules[owner], product, tally, name)
            else:
                stack.enter_context(_tapped_linear(modules[owner], tally, name))
        stack.enter_context(intercept(model, handlers))
        stack.enter_context(intercept_experts(model, products))
        stack.enter_context(differentiable_input(model))
        yield


@contextmanager
def _tapped_linear(module: nn.Module, tally: Tally, name: str) -> Iterator[None]:
    def forward(x: Tensor) -> Tensor:
        # rows alone: of more dimensions the output would be a view, which what follows may not write into
        rows, weight = x.reshape(-1, x.shape[-1]), weight_of(module)
        y: Tensor = _TappedLinear.apply(rows, weight, module.bias, tally, name)
        return y.view(*x.shape[:-1], -1)

    with with_forward(module, forward):
        yield


@contextmanager
def checkpointed(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Recompute each layer's activations in the backward pass. Dropout stays off: only the layers' own flag says training."""
    if not enabled:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise MpqError(
            "This architecture has no layers that transformers can checkpoint: set checkpoint_activations to false; "
            "a model larger than its memory needs them."
        )
    # a recomputation that is broken off early would not come to the hooks that let weights go
    how = {"use_reentrant": False, "early_stop": not is_spread(model)}
    model.gradient_checkpointing_enable(how)  # type: ignore[operator]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        model.gradient_checkpointing_disable()  # type: ignore[operator]
