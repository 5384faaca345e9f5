"""Sensitivity of the loss to rounding each operand of each matrix product (Sec. 2.2; method.md "Loss-MSE sensitivity").

For an op with operands u, and samples i with loss g_i, three sums serve every format at once:

    square   Σ_i Σ_n (∂g_i/∂u_n)² u_n²               the paper's noise, for any mantissa
    binade   Σ_i Σ_n (∂g_i/∂u_n)² 4^floor(log2|u_n|)  the rounding step of any float format
    largest  Σ_i Σ_n (∂g_i/∂u_n)² amax_n²             integers, whose Δ is amax / maximum of the element's neighbourhood

The gradients are per sample and through one use of the operand alone. An activation's come out of one backward pass of
Σ_i g_i as they are: sample i's loss does not reach the others' activations. A weight's are formed from the output
gradient and the input, G_iᵀ X_i, squared, added into one weight-sized temporary, reduced to the three sums and dropped.
Parameters never ask for gradients, so beyond the stored activations nothing is kept.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.formats.format import NOISE_MODELS, get_format
from mpq.formats.quantize import Granularity, amax_of, binade
from mpq.loss.cross_entropy import check_causal, differentiable_input, frozen, sample_losses
from mpq.models.attention import AttentionHandler, intercept
from mpq.models.blocks import Blocks
from mpq.models.linears import weight_of
from mpq.models.positions import check_length
from mpq.store.tables import table

Progress = Callable[[int, int], None]


class Tally:
    """The running sums, per (op, operand): a float64 tensor (square, binade, largest). `samples` is the batch in flight."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], Tensor] = defaultdict(
            lambda: torch.zeros(3, dtype=torch.float64)
        )
        self.samples = 0

    def add_each(
        self, op: str, operand: str, gradient: Tensor, u: Tensor, granularity: Granularity
    ) -> None:
        """Add what ∂g/∂u (…, T, K) gives, one slice of the leading dimension after the other: temporaries stay small."""
        for g, of_u in zip(gradient, u, strict=True):
            self.add(op, operand, g.float().square(), of_u, granularity)

    def add(
        self, op: str, operand: str, squared_gradient: Tensor, u: Tensor, granularity: Granularity
    ) -> None:
        """Add Σ (∂g/∂u)² · (u², binade², amax²); both tensors have u's shape, the first in FP32."""
        flat = squared_gradient.reshape(-1)
        largest = amax_of(u, granularity).square()
        over = {"tensor": None, "row": -1, "column": -2}[granularity]
        rows = flat.sum().reshape(()) if over is None else squared_gradient.sum(over, keepdim=True)
        self.sums[op, operand] += (
            torch.stack(
                [
                    torch.dot(flat, u.float().square().reshape(-1)),
                    torch.dot(flat, binade(u).square_().reshape(-1)),
                    (rows * largest).sum(),
                ]
            )
            .double()
            .cpu()
        )


class _Tap(torch.autograd.Function):
    """Identity whose backward pass sees the gradient through this use of the operand."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, tally: Tally, op: str, operand: str, granularity: Granularity
    ) -> Tensor:
        ctx.save_for_backward(u)
        ctx.where = (tally, op, operand, granularity)
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (u,) = ctx.saved_tensors
        tally, op, operand, granularity = ctx.where
        tally.add_each(op, operand, gradient, u, granularity)
        return gradient, None, None, None, None


class _TappedLinear(torch.autograd.Function):
    """x Wᵀ + b whose backward pass tallies the input's gradient and the weight's per-sample gradients.

    x (…, K), weight (C, K); `tally.samples` divides the leading dimensions of x into samples.
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
        through = gradient @ weight  # [..., C] @ [C, K] -> [..., K]
        inputs = x.reshape(tally.samples, -1, x.shape[-1])
        tally.add_each(op, "input", through.view_as(inputs), inputs, "row")
        total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        outputs = gradient.reshape(tally.samples, -1, gradient.shape[-1])
        for g, u in zip(outputs, inputs, strict=True):
            one = (g.T @ u).float()  # [C, T] @ [T, K] -> [C, K], sample i's ∂g_i/∂W
            total.addcmul_(one, one)
        tally.add(op, "weight", total, weight, "row")
        return through, None, None, None, None


class _TappedAttention(AttentionHandler):
    """Taps on the four operands of an attention's two products, K and V before their heads are repeated."""

    recompute = True

    def __init__(self, tally: Tally, name: str) -> None:
        self.tally, self.qk_name, self.av_name = tally, f"{name}.qk_matmul", f"{name}.av_matmul"

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            _Tap.apply(query, self.tally, self.qk_name, "lhs", "row"),
            _Tap.apply(key, self.tally, self.qk_name, "rhs", "row"),
            _Tap.apply(value, self.tally, self.av_name, "rhs", "column"),
        )

    def probabilities(self, p: Tensor) -> Tensor:
        return _Tap.apply(p, self.tally, self.av_name, "lhs", "row")  # type: ignore[no-any-return]


@contextmanager
def tapped(model: nn.Module, ops: Sequence[tuple[str, str]], tally: Tally) -> Iterator[None]:
    """Tap the named ops, (name, kind) each; the model computes what it did before. Taken off on leaving.

    Raises MpqError for an op that the model does not have.
    """
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        handlers: dict[str, AttentionHandler] = {}
        for name, kind in ops:
            owner = name.rpartition(".")[0] if kind == "bgemm" else name
            if owner not in modules:
                raise MpqError(
                    f"The model has no op {name!r}: partition this model and use the names from its groups table."
                )
            if kind == "bgemm":
                handlers[owner] = _TappedAttention(tally, owner)
            else:
                stack.enter_context(_tapped_linear(modules[owner], tally, name))
        stack.enter_context(intercept(model, handlers))
        stack.enter_context(differentiable_input(model))
        yield


@contextmanager
def _tapped_linear(module: nn.Module, tally: Tally, name: str) -> Iterator[None]:
    weight, bias = weight_of(module), module.bias
    module.forward = lambda x: _TappedLinear.apply(x, weight, bias, tally, name)
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _checkpointed(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Recompute each layer's activations in the backward pass. Dropout stays off: only the layers' own flag says training."""
    if not enabled:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise MpqError(
            "This architecture has no layers that transformers can checkpoint: set checkpoint_activations to false."
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        model.gradient_checkpointing_disable()  # type: ignore[operator]


def measure_sensitivity(
    model: nn.Module,
    ops: Sequence[tuple[str, str]],
    blocks: Blocks,
    *,
    formats: Sequence[str],
    base: str,
    batch: int = 8,
    base_term: bool = True,
    checkpoint_activations: bool = False,
    progress: Progress | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The `sensitivity` and `loss` tables of (name, kind) ops over calibration blocks, in one pass.

    `loss_mse` in nats² (method.md 22, 24; per operand, all formats and noise models), `sensitivity` in nats² (21, 23).
    With `base_term` false, the base format's own noise is not subtracted: the paper's form.
    The model comes back as it was. Raises MpqError for a loss or a gradient that is not finite, for a format that is
    unknown, for a model whose tokens see the ones after them, and for blocks longer than its learned positions.
    """
    for name in (*formats, base):
        get_format(name)
    if not len(blocks.tokens):
        raise MpqError("The calibration set is empty: give at least one block of tokens.")
    tally, losses = Tally(), []
    device = str(next(model.parameters()).device)
    total = math.ceil(len(blocks.tokens) / batch)
    check_length(model.config, blocks.tokens.shape[1])
    check_causal(model)
    with (
        frozen(model),
        tapped(model, ops, tally),
        _checkpointed(model, checkpoint_activations),
        torch.enable_grad(),
    ):
        for done, tokens in enumerate(blocks.batches(batch, device)):
            tally.samples = len(tokens)
            loss = sample_losses(model, tokens)
            if not torch.isfinite(loss).all():
                at = int((~torch.isfinite(loss)).nonzero()[0])
                raise MpqError(
                    f"The loss of calibration sample {done * batch + at} is {loss[at].item()}: the model or its base format {base} is broken there; check the checkpoint or use fp32."
                )
            loss.sum().backward()
            losses.append(loss.detach().double().cpu())
            if progress:
                progress(done + 1, total)
    return _tables(tally, torch.cat(losses), formats, base, base_term)


def _tables(
    tally: Tally, losses: Tensor, formats: Sequence[str], base: str, base_term: bool
) -> tuple[pl.DataFrame, pl.DataFrame]:
    n = len(losses)
    rows: list[dict[str, object]] = []
    for (op, operand), sums in tally.sums.items():
        if not torch.isfinite(sums).all():
            raise MpqError(
                f"The gradient of {operand} of {op} is not finite: calibrate in a wider base format or with other text."
            )
        square, in_binade, largest = (sums / n).tolist()
        for noise_model in NOISE_MODELS:
            of_float = square if noise_model == "paper" else in_binade
            subtract = of_float * get_format(base).relative_variance if base_term else 0.0
            for name in dict.fromkeys((base, *formats)):
                fmt = get_format(name)
                noise = (
                    largest / fmt.maximum**2 / 12
                    if fmt.kind == "int"
                    else of_float * fmt.relative_variance
                )
                loss_mse = 0.0 if name == base and base_term else max(0.0, noise - subtract)
                rows.append(
                    {
                        "op": op,
                        "operand": operand,
                        "format": name,
                        "noise_model": noise_model,
                        "n_samples": n,
                        "loss_mse": loss_mse,
                        "sensitivity": square,
                    }
                )
    loss: dict[str, object] = {
        "n_samples": n,
        "mean_square_loss": losses.square().mean().item(),
        "mean_loss": losses.mean().item(),
    }
    return table("sensitivity", rows), table("loss", [loss])


def merge(
    sensitivities: Sequence[pl.DataFrame], losses: Sequence[pl.DataFrame]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Shards' tables as one: means weighted by their samples, which is the sum over all samples divided by their number."""
    return (
        _weighted_mean(
            sensitivities, ["op", "operand", "format", "noise_model"], ["loss_mse", "sensitivity"]
        ),
        _weighted_mean(losses, [], ["mean_square_loss", "mean_loss"]),
    )


def _weighted_mean(frames: Sequence[pl.DataFrame], by: list[str], means: list[str]) -> pl.DataFrame:
    together = pl.concat(frames)
    n = pl.col("n_samples")
    summed = [
        n.sum().alias("n_samples"),
        *(((pl.col(c) * n).sum() / n.sum()).alias(c) for c in means),
    ]
    merged = (
        together.group_by(by, maintain_order=True).agg(summed) if by else together.select(summed)
    )
    return merged.select(frames[0].columns)
