"""The loss g of the method: mean cross entropy of each sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mpq.errors import MpqError, first_line, is_out_of_memory
from mpq.models.placement import device_of


def sample_losses(model: nn.Module, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """g_i: mean cross entropy (nats) over the predicted tokens of each sample, padding left out.

    tokens (B, T) int64, attention_mask (B, T) or None; returns (B,) FP32. Source: method.md, "Loss-MSE sensitivity".
    """
    predicted = log_probabilities(model, tokens, attention_mask)
    loss = -of_labels(predicted, tokens[:, 1:])
    if attention_mask is None:
        return loss.mean(dim=1)
    real = attention_mask[:, 1:].to(loss.dtype)
    return (loss * real).sum(dim=1) / real.sum(dim=1)


def log_probabilities(
    model: nn.Module, tokens: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """ln of what the model predicts after every token but the last, (B, T - 1, vocabulary) FP32."""
    logits = model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits, -1, dtype=torch.float32)


def of_labels(predicted: Tensor, labels: Tensor) -> Tensor:
    """The entries of `predicted` (B, T, vocabulary) at `labels` (B, T)."""
    return predicted.gather(-1, labels[..., None]).squeeze(-1)


def drawn_labels(predicted: Tensor, tokens: Tensor, seed: int) -> Tensor:
    """Labels (B, T) drawn from `predicted`, log-probabilities (B, T, vocabulary).

    A sample's draw depends on `seed` and its own `tokens`, not on its place among others, so that shards of a text
    draw what the whole of it does.
    """
    labels = []
    for row, given in zip(predicted.detach(), tokens.cpu(), strict=True):
        content = f"{seed}/".encode() + given.numpy().tobytes()
        draw = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
        )
        below = row.exp().cumsum(-1)
        at = torch.rand(len(row), 1, generator=draw).to(row.device) * below[:, -1:]
        label = torch.searchsorted(below, at, right=True).clamp_(max=row.shape[-1] - 1)
        labels.append(label.squeeze(-1))
    return torch.stack(labels)


def check_causal(model: nn.Module) -> None:
    """Raise MpqError where a token's logits depend on the tokens after it, as in an encoder.

    Told by the gradient of all logits but the last with respect to the last token, which is exactly zero in a causal
    model. Cross entropy of the next token would measure nothing there: the model has seen the answer. Also raises MpqError
    for a model that cannot run at all, as a mistyped value of its config.json leaves it.
    """
    device = device_of(model)
    tokens = torch.arange(1, 5, device=device)[None]
    inputs: list[Tensor] = []
    with frozen(model), differentiable_input(model, inputs), torch.enable_grad():
        try:
            logits = model(input_ids=tokens, use_cache=False).logits
        except Exception as error:  # whatever an architecture's own code raises
            if is_out_of_memory(error):
                raise
            raise MpqError(
                f"{type(model).__name__} does not run on four tokens ({first_line(error)}): check its config.json."
            ) from None
        (gradient,) = torch.autograd.grad(logits[:, :-1].float().square().sum(), inputs[:1])
    seen = gradient[:, -1]
    if (seen.isfinite() & (seen != 0)).any():  # a broken model's NaN says nothing of it
        raise MpqError(
            f"{type(model).__name__} lets each token see the ones after it: mpq measures the loss of the next token, which needs a causal language model, not an encoder."
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` asks for a gradient within; on leaving each asks for one as it did before."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()


@contextmanager
def differentiable_input(model: nn.Module, seen: list[Tensor] | None = None) -> Iterator[None]:
    """Start the autograd graph at the embedding's output: no parameter asks for a gradient. `seen` is given the leaves."""

    def start(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        if seen is not None:
            seen.append(leaf)
        return leaf.clone()  # what a model may scale in place

    hook = model.get_input_embeddings().register_forward_hook(start)  # type: ignore[operator]
    try:
        yield
    finally:
        hook.remove()
