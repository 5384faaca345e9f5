"""KL of the first layer's attention, run and not summed: tokens of one id have one input there, and so one error.

First-order sums take the errors of different tokens to cancel. What reads the embeddings alone has the same input wherever a
token comes again and rounds it the same way, and attention adds these errors up: q, k and v of a first layer were predicted at
0.57 to 0.8 of their KL, its products at 0.7 to 0.9 (docs/log.md). Summed by id they come out right and scatter by a fifth, since
labels are drawn and a few ids are most of a text. A forward pass draws none.

In FP32 these ops run as they round. A 16-bit base would round all that follows anew, which moves the predictions more than they
do: there forward differentiation takes their errors e to the logits, δz = (∂z/∂u) e, and

    KL ≈ ½ Σ_v p_v (δz_v − Σ_w p_w δz_w)²,

the quadratic form that the sums estimate (method.md "KL and the rounding that happens"). In FP32 the two are within 2 % of each
other, and the second takes four times as long.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpq.errors import first_line
from mpq.formats.scheme import Operand, Scheme, get_scheme
from mpq.kernels import emulated
from mpq.models.attention import PlainAttention, intercept
from mpq.models.blocks import Blocks
from mpq.models.experts import (
    ExpertProduct,
    Products,
    Routing,
    dispatched,
    intercept_experts,
    products_of,
)
from mpq.models.linears import weight_of
from mpq.models.placement import comes_and_goes, device_of, with_forward
from mpq.running.attention import EmulatedAttention

TOKENS = 2048  # that run, more where that is less than two samples
SUMMED = "kl_summed"  # what the sums said of the KL
log = logging.getLogger("mpq")
_Errors = Mapping[str, emulated.Linear]  # of ops, x (…, K) to what their output errs by (…, C)


@dataclass(frozen=True)
class _Part:
    """Ops of one module in a scheme together, and the KL that the sums give them (nats per token)."""

    ops: tuple[str, ...]
    scheme: Scheme
    summed: float


def with_first_layer(
    sensitivity: pl.DataFrame, model: nn.Module, blocks: Blocks, batch: int = 8
) -> pl.DataFrame:
    """The sensitivity table with the KL of the first layer's q, k and v, and of its attention's products, as run.

    On the first `TOKENS` tokens, about, of `blocks`, for each format that rounds activations; twice where attention's products have
    sensitivities. The rows of a module's linears, or of its products, keep their shares of the whole; their `kl_stderr` is its
    spread over samples, and `kl_summed` keeps what the sums said. A table without KL comes back as it is; so does one of a model
    whose first layer sees more than ids (learned positions), or that torch cannot differentiate forward, which the log says.
    """
    if "kl" not in sensitivity.columns:
        return sensitivity
    few = blocks.tokens[: max(2, TOKENS // blocks.tokens.shape[1])]
    batches = list(Blocks(few).batches(batch, str(device_of(model))))
    parts = _parts(sensitivity, _read_ids_alone(model, sensitivity, batches[0]))
    if not parts:
        return sensitivity
    try:
        found = _run(model, parts, batches)
    except NotImplementedError as error:
        log.warning(
            "The first layer's KL stays as it was summed, too low by up to half: %s",
            first_line(error),
        )
        return sensitivity
    return _corrected(sensitivity, parts, found)


def _read_ids_alone(model: nn.Module, sensitivity: pl.DataFrame, tokens: Tensor) -> list[str]:
    """The linears whose input is the same, bit for bit, wherever a token of the batch comes again."""
    ids, first = tokens.flatten(), dict[int, int]()
    before = torch.tensor([first.setdefault(token, i) for i, token in enumerate(ids.tolist())])
    again = (before != torch.arange(len(ids))).nonzero().flatten()
    if not len(again):
        return []
    before, found = before[again], []

    def look(op: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].reshape(-1, arguments[0].shape[-1])
            if len(rows) == len(ids) and torch.equal(rows[again], rows[before]):
                found.append(op)

        return see

    linears = sensitivity.filter(pl.col("operand") == "input")["op"].unique(maintain_order=True)
    modules = dict(model.named_modules())
    hooks = [modules[op].register_forward_pre_hook(look(op)) for op in linears if op in modules]
    try:
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _parts(sensitivity: pl.DataFrame, linears: Sequence[str]) -> list[_Part]:
    """What runs together: in each format a module's linears among these, and its attention's products.

    Modules all of whose linears read ids alone mix no tokens (an MLP beside attention): errors do not add up there.
    """
    rows = sensitivity.filter(noise_model="actual").drop_nulls("kl")
    ops = dict(rows.select("op", "operand").iter_rows())
    mixing = {_owner(op) for op in ops if op not in linears} & {_owner(op) for op in linears}
    sums: dict[tuple[str, str, bool], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for op, operand, name, kl in rows.select("op", "operand", "format", "kl").iter_rows():
        product = operand in ("lhs", "rhs")
        if _owner(op) in mixing and (product or op in linears):
            sums[_owner(op), name, product][op] += kl
    found = [
        _Part(tuple(of), get_scheme(name), math.fsum(of.values()))
        for (_, name, product), of in sums.items()
        if product or get_scheme(name).activations is not None
    ]
    return [part for part in found if 0 < part.summed < math.inf]


def _owner(op: str) -> str:
    return op.rpartition(".")[0]


def _run(
    model: nn.Module, parts: Sequence[_Part], batches: Sequence[Tensor]
) -> list[tuple[float, float]]:
    """The KL of each part (nats per token), and its standard error over samples."""
    of_samples: list[list[Tensor]] = [[] for _ in parts]
    errors = [_errors_of(model, part) for part in parts]
    exact = next(model.parameters()).dtype == torch.float32
    # fused attention has no forward derivative
    with torch.no_grad(), nullcontext() if exact else sdpa_kernel(SDPBackend.MATH):
        for tokens in batches:
            base = _logits(model, tokens) if exact else None
            for part, error, found in zip(parts, errors, of_samples, strict=True):
                with forward_ad.dual_level(), _erring(model, part, error, not exact):
                    logits, tangent = forward_ad.unpack_dual(_logits(model, tokens))
                of = _quadratic(logits, tangent) if base is None else _divergence(base, logits)
                found.append(of.mean(1).cpu())
    each = [torch.cat(found) for found in of_samples]
    return [
        (kl.mean().item(), (kl.std() / math.sqrt(len(kl))).item() if len(kl) > 1 else math.nan)
        for kl in each
    ]


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, T − 1, V)."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[:, :-1]


def _divergence(base: Tensor, logits: Tensor) -> Tensor:
    """KL of the predictions from base's, (…,) float64, of logits (…, V)."""
    p, q = (torch.log_softmax(x, -1, dtype=torch.float32) for x in (base, logits))
    return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1).double()


def _quadratic(logits: Tensor, tangent: Tensor | None) -> Tensor:
    """½ of the variance of the logits' tangent (…, V) over the vocabulary, as predicted: (…,) float64."""
    if tangent is None:
        raise NotImplementedError("the logits have no tangent.")
    p, tangent = torch.softmax(logits, -1, dtype=torch.float32), tangent.float()
    mean = (p * tangent).sum(-1, keepdim=True)
    return (p * (tangent - mean).square_()).sum(-1).double() / 2


@contextmanager
def _erring(model: nn.Module, part: _Part, errors: _Errors, tangents: bool) -> Iterator[None]:
    """Within, the part's ops run as they round; or with `tangents`, all in base, with their errors as tangents."""
    schemes: dict[str, dict[str, Scheme]] = defaultdict(dict)
    for op in part.ops:
        if op not in errors:
            schemes[_owner(op)][op.rpartition(".")[2]] = part.scheme
    attention = _Erring if tangents else EmulatedAttention
    with ExitStack() as stack:
        for op, error in errors.items():
            module = model.get_submodule(op)
            stack.enter_context(with_forward(module, _with_error(module, error, tangents)))
        stack.enter_context(intercept(model, {o: attention(o, of) for o, of in schemes.items()}))
        if tangents:
            stack.enter_context(intercept_experts(model, _one_by_one(model)))
        yield


def _errors_of(model: nn.Module, part: _Part) -> _Errors:
    """What each of a part's linears errs by in its scheme, in FP32: in 16 bits the output's own rounding would be in it.

    Weights that come and go are rounded at every call.
    """

    def error(op: str) -> emulated.Linear:
        module: Any = model.get_submodule(op)

        def made() -> emulated.Linear:
            weight = weight_of(module).float()
            lowered = emulated.linear(weight, None, part.scheme)
            return lambda x: lowered(x) - F.linear(x, weight)

        return (lambda x: made()(x)) if comes_and_goes(module) else made()

    modules = {name for name, _ in model.named_modules()}
    return {op: error(op) for op in part.ops if op in modules}


def _with_error(module: Any, error: emulated.Linear, tangents: bool) -> emulated.Linear:
    """The module's forward, and the error on top of it or as its tangent."""

    def forward(x: Tensor) -> Tensor:
        y = F.linear(x, weight_of(module), module.bias)
        if not tangents:
            return y + error(x)
        return _dual(y, error(forward_ad.unpack_dual(x).primal.float()))

    return forward


def _one_by_one(model: nn.Module) -> Products:
    """All experts' products, an expert after the other: what groups them has no forward derivative."""
    modules = {name: module for name, module in model.named_modules() if dispatched(module)}
    return {
        name: {product: _OneByOne(module, product) for product in products_of(module)}
        for name, module in modules.items()
    }


class _OneByOne(ExpertProduct):
    def multiply(self, x: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        return torch.cat([x[rows] @ weights[expert] for expert, rows in routing.of_experts()])


class _Erring(EmulatedAttention):
    """Attention as in base, with the errors of its rounded operands as tangents."""

    def fused(self, attention: PlainAttention) -> Tensor | None:  # type: ignore[override]
        """None: what is fused writes into its output, where no tangent goes."""
        return None

    def _round(self, x: Tensor, product: str, operand: Operand) -> Tensor:
        exact = forward_ad.unpack_dual(x).primal.float()
        return _dual(x, super()._round(exact, product, operand) - exact)


def _dual(x: Tensor, error: Tensor) -> Tensor:
    """x with an error as tangent, on top of one that it has already."""
    exact, tangent = forward_ad.unpack_dual(x)
    error = error.to(exact.dtype)
    dual: Tensor = forward_ad.make_dual(exact, error if tangent is None else tangent + error)
    return dual


def _corrected(
    sensitivity: pl.DataFrame, parts: Sequence[_Part], found: Sequence[tuple[float, float]]
) -> pl.DataFrame:
    """The table with each part's rows at the KL that was found."""
    factors = pl.DataFrame(
        [
            {"op": op, "format": part.scheme.name, "factor": kl / part.summed, "error": error / kl}
            for part, (kl, error) in zip(parts, found, strict=True)
            for op in part.ops
            if 0 < kl < math.inf
        ],
        schema={"op": pl.String, "format": pl.String, "factor": pl.Float64, "error": pl.Float64},
    ).with_columns(noise_model=pl.lit("actual"))
    joined = sensitivity.join(
        factors, on=["op", "format", "noise_model"], how="left", maintain_order="left"
    )
    ran = pl.col("factor").is_not_null() & pl.col("kl").is_not_null()
    kl = pl.col("kl") * pl.col("factor")
    return joined.with_columns(
        pl.when(ran).then(kl).otherwise("kl").alias("kl"),
        pl.when(ran)
        .then(kl * pl.col("error").fill_nan(None))
        .otherwise("kl_stderr")
        .alias("kl_stderr"),
        pl.when(ran).then("kl").alias(SUMMED),
        *(
            pl.when(~ran).then(column).alias(column)
            for column in ("kl_shared", "kl_shared_stderr")
            if column in sensitivity.columns
        ),
    ).drop("factor", "error")
