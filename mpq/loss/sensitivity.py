"""Sensitivity of the loss, and of the model's predictions, to rounding each operand of each matrix product.

For an op with operands u, and samples i with loss g_i, sums over samples and elements serve every format and noise model
at once (Sec. 2.2; method.md "Loss-MSE sensitivity"):

    Σ (∂g_i/∂u_n)² u_n²                the paper's noise, for any mantissa
    Σ (∂g_i/∂u_n)² 4^floor(log2|u_n|)  the rounding step of any float format
    Σ (∂g_i/∂u_n)² amax_n²             integers, whose Δ is amax / maximum of the element's neighbourhood
    Σ (∂g_i/∂u_n)² (Q_f(u_n) − u_n)²   the rounding that happens, for each format f

The last takes an activation's errors to cancel over its elements. Where those of a token have signs in common (most of GELU's
outputs and of attention's P lie below half an integer's step and go to zero), Σ_t (Σ ∂g_i/∂u_n (Q_f(u_n) − u_n))² is taken,
with what belongs to one token summed before it is squared (shared.py).

With them comes Σ ∂g_i/∂w_n (Q_f(w_n) − w_n) of each sample and weight, with its sign (effects.py).

The last sum once more, with labels drawn from the model's own predictions in place of the text's, gives the KL divergence
from base (method.md "KL and the rounding that happens"): a second backward pass through the same forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import polars as pl
import torch
from torch import Tensor, nn

from mpq.errors import MpqError
from mpq.formats.format import NOISE_MODELS, NoiseModel
from mpq.formats.scheme import Scheme, get_scheme
from mpq.kernels.errors import MAGNITUDES
from mpq.loss.cross_entropy import (
    check_causal,
    drawn_labels,
    frozen,
    log_probabilities,
    of_labels,
)
from mpq.loss.effects import effects_table
from mpq.loss.first_layer import SUMMED, with_first_layer
from mpq.loss.heap import give_back_large_tensors
from mpq.loss.shared import estimated, mean, merged
from mpq.loss.taps import Tally, checkpointed, tapped
from mpq.loss.unseen import tokens_of, warn_unseen, with_tokens
from mpq.models.blocks import Blocks
from mpq.models.placement import device_of, is_spread
from mpq.models.positions import check_length
from mpq.store.tables import table

Progress = Callable[[int, int], None]
Measure = Literal["loss", "kl"]


class Measured(NamedTuple):
    """The tables of one measurement; `effects` is empty where the loss was not among the measures."""

    sensitivity: pl.DataFrame
    loss: pl.DataFrame
    effects: pl.DataFrame


def measure_sensitivity(
    model: nn.Module, ops: Sequence[tuple[str, str]], blocks: Blocks, **how: Any
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The `sensitivity` and `loss` tables of `measure`, which says what `how` may be."""
    found = measure(model, ops, blocks, **how)
    return found.sensitivity, found.loss


def measure(
    model: nn.Module,
    ops: Sequence[tuple[str, str]],
    blocks: Blocks,
    *,
    formats: Sequence[str],
    base: str,
    batch: int = 8,
    base_term: bool = True,
    checkpoint_activations: bool = False,
    measures: Collection[Measure] = ("loss", "kl"),
    label_seed: int = 0,
    labels: int = 1,
    first_layer: bool = True,
    progress: Progress | None = None,
) -> Measured:
    """The `sensitivity`, `loss` and `effects` tables of (name, kind) ops over calibration blocks, in one pass.

    `effects` in nats; `loss_mse` in nats² (method.md 22, 24; per operand, all formats and noise models), `sensitivity` in nats² (21, 23);
    `kl` in nats per predicted token, of noise model `actual`, with `kl_stderr`, its standard error over samples. Each of
    the `measures` costs a backward pass; what is not measured is null. `label_seed` draws the labels of `kl`,
    `labels` times, each a backward pass more: `kl` is the mean over draws, and its error is smaller.
    With `first_layer` the KL of its attention is run, not summed (first_layer.py): off for a part of a text, whose sums are merged.
    With `base_term` false, the base format's own noise is not subtracted: the paper's form.
    Where the model has experts, `expert_tokens` says how many tokens each of an op's got (unseen.py).
    The model comes back as it was. Raises MpqError for a loss or a gradient that is not finite, for a format that is
    unknown, for a model whose tokens see the ones after them, and for blocks longer than its learned positions.
    """
    known = [get_scheme(name) for name in dict.fromkeys((base, *formats))]
    if labels < 1:
        raise MpqError(f"KL needs labels: expected one draw or more, got {labels}.")
    if not len(blocks.tokens):
        raise MpqError("The calibration set is empty: give at least one block of tokens.")
    tally, losses = Tally(known[1:]), []
    device = str(device_of(model))
    give_back_large_tensors()
    total = math.ceil(len(blocks.tokens) / batch)
    check_length(model.config, blocks.tokens.shape[1])
    # a graph of all layers would hold the weights of all of them
    with checkpointed(model, is_spread(model)):
        check_causal(model)
    with (
        frozen(model),
        tapped(model, ops, tally),
        checkpointed(model, checkpoint_activations or is_spread(model)),
        torch.enable_grad(),
    ):
        for done, tokens in enumerate(blocks.batches(batch, device)):
            predicted = log_probabilities(model, tokens)
            loss = -of_labels(predicted, tokens[:, 1:]).mean(dim=1)
            if not torch.isfinite(loss).all():
                at = int((~torch.isfinite(loss)).nonzero()[0])
                raise MpqError(
                    f"The loss of calibration sample {done * batch + at} is {loss[at].item()}: the model or its base format {base} is broken there; check the checkpoint or use fp32."
                )
            losses.append(loss.detach().double().cpu())
            if "loss" in measures:
                with tally.of("loss", len(tokens)):
                    loss.sum().backward(retain_graph="kl" in measures)
            if "kl" in measures:
                with tally.of("kl", len(tokens), labels):
                    for draw in range(labels):
                        drawn = drawn_labels(predicted, tokens, label_seed + draw)
                        drawn_loss = -of_labels(predicted, drawn).mean(dim=1)
                        drawn_loss.sum().backward(retain_graph=draw + 1 < labels)
            if progress:
                progress(done + 1, total)
    sensitivity, of_loss = _tables(
        tally, torch.cat(losses), blocks.tokens.shape[1] - 1, known[0], base_term
    )
    got = next(iter(tally.tokens.values()), {})  # the same of every loss
    sensitivity = with_tokens(sensitivity, {op: counts.tolist() for op, counts in got.items()})
    effects = effects_table(tally.effects["loss"], tally.done["loss"], tally.schemes)
    if first_layer and "kl" in measures:
        sensitivity = with_first_layer(sensitivity, model, blocks, batch)
    return Measured(sensitivity, of_loss, effects)


def _tables(
    tally: Tally, losses: Tensor, predicted_tokens: int, base: Scheme, base_term: bool
) -> tuple[pl.DataFrame, pl.DataFrame]:
    n = len(losses)
    rows: list[dict[str, object]] = []
    for op, operand in next(iter(tally.sums.values()), {}):
        sums = {loss: of[op, operand] for loss, of in tally.sums.items()}
        if not all(torch.isfinite(of[:, :MAGNITUDES]).all() for of in sums.values()):
            raise MpqError(
                f"The gradient of {operand} of {op} is not finite: calibrate in a wider base format or with other text."
            )
        shared = {loss: of.get((op, operand)) for loss, of in tally.shared.items()}
        means = estimated(sums.get("loss"), shared.get("loss"), n)
        # b of each format, nats per token: method.md "KL and the rounding that happens"
        kl = estimated(sums.get("kl"), shared.get("kl"), n, predicted_tokens / 2)
        for noise_model in NOISE_MODELS:
            actual = noise_model == "actual"
            for i, scheme in enumerate((base, *tally.schemes), -1):
                product = operand in ("lhs", "rhs")
                runs = scheme.rounds("rhs" if product else "weight")
                if not runs or not (actual or scheme.alike):
                    continue  # no variance is known of blocks, and attention cannot run in them
                rows.append(
                    {
                        "op": op,
                        "operand": operand,
                        "format": scheme.name,
                        "noise_model": noise_model,
                        "n_samples": n,
                        "loss_mse": means
                        and _loss_mse(means.values, i, scheme, noise_model, base, base_term),
                        # base's own noise left in, which is next to nothing of it
                        "loss_mse_stderr": means
                        and means.errors
                        and (i >= 0 or not base_term)
                        * _loss_mse(means.errors, i, scheme, noise_model, base, False),
                        "sensitivity": means and means.values[0],
                        "kl": _of_format(kl.values, i) if kl and actual else None,
                        "kl_stderr": _of_format(kl.errors, i)
                        if kl and kl.errors and actual
                        else None,
                        **(means.columns("loss_mse", i) if means and actual else {}),
                        **(kl.columns("kl", i) if kl and actual else {}),
                    }
                )
    loss: dict[str, object] = {
        "n_samples": n,
        "mean_square_loss": losses.square().mean().item(),
        "mean_loss": losses.mean().item(),
    }
    return table("sensitivity", rows), table("loss", [loss])


def _loss_mse(
    means: list[float],
    i: int,
    scheme: Scheme,
    noise_model: NoiseModel,
    base: Scheme,
    base_term: bool,
) -> float:
    """Loss MSE (nats²) of the tally's scheme number i; -1 is base, whose operands are in it already."""
    if noise_model == "actual":
        return _of_format(means, i)
    square, in_binade, largest = means[:MAGNITUDES]
    of_float = square if noise_model == "paper" else in_binade
    fmt = scheme.weights
    of_int = largest / fmt.top**2 / 12
    noise = of_int if fmt.kind == "int" else of_float * fmt.relative_variance
    if not base_term:
        return noise
    return 0.0 if i < 0 else max(0.0, noise - of_float * base.weights.relative_variance)


def _of_format(values: list[float], i: int) -> float:
    """The value of the tally's format number i; of -1, base, whose rounding is in the model already, nothing."""
    return 0.0 if i < 0 else values[MAGNITUDES + i]


def merge(
    sensitivities: Sequence[pl.DataFrame], losses: Sequence[pl.DataFrame]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Shards' tables as one: means weighted by their samples, which is the sum over all samples divided by their number.

    Standard errors are those of all samples together, from the spread within shards and between their means.
    """
    by = ["op", "operand", "format", "noise_model"]
    groups = pl.concat(sensitivities).group_by(by, maintain_order=True)
    means = [mean("sensitivity"), *merged("loss_mse"), *merged("kl"), mean(SUMMED)]
    sensitivity = groups.agg(pl.col("n_samples").sum(), *means)
    n = pl.col("n_samples").sum()
    loss = pl.concat(losses).select(n, mean("mean_square_loss"), mean("mean_loss"))
    whole = with_tokens(table("sensitivity", sensitivity.to_dicts()), tokens_of(*sensitivities))
    warn_unseen(whole)
    return whole, table("loss", loss.to_dicts())
