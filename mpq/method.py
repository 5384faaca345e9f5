"""The method step by step, a function each, as notebooks and the command line call it.

Models and tables go in, tables come out (their columns: docs/method.md). What is slow to load is imported where it is
used, so that a mistake is told before torch and transformers have loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpq.errors import MpqError

if TYPE_CHECKING:
    import polars as pl
    from torch import nn

    from mpq.formats.format import NoiseModel
    from mpq.loss.sensitivity import Measured
    from mpq.models.blocks import Blocks
    from mpq.program.choice import Facts
    from mpq.program.memory import Requests
    from mpq.program.plan import Plan
    from mpq.program.signed import SignedLoss
    from mpq.program.solver import Solution, SolverName
    from mpq.spec import Objective

Progress = Callable[[int, int], None]  # done, total


def read_text(folder: Path, source: str, *, trust_remote_code: bool = False, **how: Any) -> Blocks:
    """Blocks of tokens drawn from a text, by the tokenizer of the checkpoint in `folder`.

    `how` is what a spec's `calibration` may say of a text: samples, length, seed, field, split. Raises MpqError for
    what is none of these, and where there is no text, or too little.
    """
    from mpq.models.checkpoint import load_config
    from mpq.models.text import read_blocks
    from mpq.spec import parse_text

    text = parse_text(source=source, **how)
    vocabulary = load_config(folder, trust_remote_code).get_text_config().vocab_size
    return read_blocks(text, folder, vocabulary, trust_remote_code)


def groups_of(config: Any, batch: int = 1, length: int = 1024) -> pl.DataFrame:
    """The model's matrix products in sequential groups: the `groups` table of a prefill of batch × length tokens.

    `config` is the model's configuration (load_config); no weights are needed.
    """
    from mpq.models.graph import trace
    from mpq.models.partition import groups_table, partition

    return groups_table(partition(trace(config)), batch, length)


def sensitivity_of(
    model: nn.Module,
    groups: pl.DataFrame,
    blocks: Blocks,
    formats: Sequence[str],
    base: str,
    **how: Any,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What rounding each operand does to the loss: the `sensitivity` and `loss` tables (nats²) of `losses_of`."""
    found = losses_of(model, groups, blocks, formats, base, **how)
    return found.sensitivity, found.loss


def losses_of(
    model: nn.Module,
    groups: pl.DataFrame,
    blocks: Blocks,
    formats: Sequence[str],
    base: str,
    **how: Any,
) -> Measured:
    """The `sensitivity` and `loss` tables (nats²), and `effects` (nats), which a bound with signs needs.

    One forward and backward pass over the blocks; `how`: see loss.sensitivity.measure.
    """
    import polars as pl

    from mpq.loss.sensitivity import measure
    from mpq.loss.unseen import warn_unseen

    ops = list(groups.filter(pl.col("kind") != "other").select("op", "kind").iter_rows())
    found = measure(model, ops, blocks, formats=formats, base=base, **how)
    warn_unseen(found.sensitivity)
    return found


def times_of(
    config: Any,
    formats: Sequence[str],
    base: str,
    device: str = "cpu",
    *,
    batch: int = 4,
    length: int = 256,
    limit: int = 64,
    seed: int = 0,
    **how: Any,
) -> pl.DataFrame:
    """What each configuration of each kind of group gains on the device: the `timing` table of a prefill (s).

    Weights are random: their values do not decide the time. At most `limit` configurations of a signature are
    measured; `how`: see timing.measure. Raises MpqError for a format that the device has no kernel for.
    """
    import polars as pl

    from mpq.kernels import check_native, native_formats
    from mpq.program.engines import KINDS
    from mpq.timing.design import choices_of, design

    check_native(formats, device)
    from mpq.timing.measure import measure, timing_model

    groups = groups_of(config, batch, length)
    native: dict[str, list[str]] = {
        kind: [f for f in formats if f in native_formats(device, kind)] for kind in KINDS
    }
    requests = []
    for (signature,), rows in groups.sort("order").group_by(["signature"], maintain_order=True):
        first = rows.filter(pl.col("group") == rows["group"].min())
        requests.append((str(signature), design(choices_of(first, native, base), limit, seed)))
    model = timing_model(config, base).to(device)
    return measure(model, groups, requests, base=base, batch=batch, length=length, seed=seed, **how)


def gains_of(
    objective: Objective,
    groups: pl.DataFrame,
    sensitivity: pl.DataFrame,
    formats: Sequence[str],
    base: str,
    *,
    timing: pl.DataFrame | None = None,
    noise_model: NoiseModel = "actual",
    requests: Requests | None = None,
) -> pl.DataFrame:
    """The program's coefficients, the `gains` table: et gains measured seconds, tt MAC time, m bytes of weights, and those of the
    cache of `requests` where a scheme of it is among the formats.

    Raises MpqError for et without a `timing` table, a scheme of the cache without `requests`, and where a table lacks an op, a
    format or a signature.
    """
    from mpq.program.gains import gains_et, gains_m, gains_tt

    if objective == "et":
        if timing is None:
            raise MpqError("Gains in measured time (et) need the timing table: see times_of.")
        return gains_et(groups, timing, sensitivity, base, noise_model)
    if objective == "tt":
        return gains_tt(groups, sensitivity, formats, base, noise_model)
    if objective == "m":
        return gains_m(groups, sensitivity, formats, base, noise_model, requests=requests)
    raise MpqError(f"Unknown objective {objective!r}: expected et, tt or m.")


def best_plan(
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    loss: pl.DataFrame,
    tau: float | None,
    base: str,
    solver: SolverName = "auto",
    *,
    kl: float | None = None,
    signed: SignedLoss | None = None,
) -> Plan:
    """The plan with the largest gain whose predicted loss MSE stays under τ² E[g²], or whose predicted KL divergence from
    base stays under `kl` (nats per token), or both. With `signed` the loss MSE is that with rounding's signs.

    `loss` is the one-row table beside the sensitivities. Raises MpqError for no bound and for one that is not above zero.
    """
    from mpq.program.strategies import choose

    objective = gains["objective"][0]
    plan, _ = choose(
        f"ip_{objective}",
        objective,
        groups,
        gains,
        tau=tau,
        kl=kl,
        mean_square_loss=loss["mean_square_loss"][0],
        base=base,
        solver=solver,
        signed=signed,
    )
    return plan


def plan_of(
    solution: Solution,
    groups: pl.DataFrame,
    gains: pl.DataFrame,
    loss: pl.DataFrame,
    budget: float,
    base: str,
    cost: Literal["loss_mse", "kl"] = "loss_mse",
    signed: SignedLoss | None = None,
) -> Plan:
    """The plan that a solution of the gains table is, found under a bound on the loss MSE itself (nats²) or on the KL.

    Raises MpqError for tables of another kind, and a bound that is not above zero.
    """
    from mpq.program.strategies import as_plan
    from mpq.store.handed_in import handed_in

    groups, loss = handed_in("groups", groups), handed_in("loss", loss)
    gains = fitting(handed_in("gains", gains), groups)
    square, objective = loss["mean_square_loss"][0], gains["objective"][0]
    bound = {"kl": budget} if cost == "kl" else {"tau": math.sqrt(max(0.0, budget) / square)}
    facts: Facts = {"mean_square_loss": square, "base": base, "signed": signed}
    return as_plan(objective, groups, gains, solution, **bound, **facts)


def fitting(gains: pl.DataFrame, groups: pl.DataFrame) -> pl.DataFrame:
    """The gains table. Raises MpqError where the groups table has not the ops that its rows choose formats of."""
    from mpq.timing.design import members

    of = members(groups, gains)
    for group, formats in gains.select("group", "configuration").iter_rows():
        if len(of.get(group, ())) != len(formats):
            raise MpqError(
                f"The gains table has {len(formats)} formats for group {group}, which has {len(of.get(group, ()))} ops in the groups table: "
                "give the groups table that the gains are of."
            )
    return gains


def with_signs(
    gains: pl.DataFrame, sensitivity: pl.DataFrame, effects: pl.DataFrame, base: str
) -> SignedLoss:
    """The loss MSE with rounding's signs and the drift, for the plans of a gains table; warns where it is of fewer samples than
    they take decisions. Raises MpqError for tables of another kind."""
    from mpq.program.signed import signed_loss, warn_few
    from mpq.store.handed_in import handed_in

    found = signed_loss(handed_in("sensitivity", sensitivity), handed_in("effects", effects), base)
    warn_few(found, handed_in("gains", gains)["group"].n_unique())
    return found


def evaluate_plan(
    model: nn.Module,
    plan: Plan,
    blocks: Blocks,
    seeds: int = 3,
    batch: int = 8,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """What a plan really does to loss and perplexity, with real quantization: a row a seed and metric, beside base's.

    Raises MpqError for a model whose tokens see the ones after them, an encoder, as sensitivity does.
    """
    from mpq.evaluation.losses import evaluate_loss, losses
    from mpq.loss.cross_entropy import check_causal
    from mpq.loss.taps import checkpointed
    from mpq.models.placement import is_spread

    with checkpointed(model, is_spread(model)):
        check_causal(model)
    return evaluate_loss(
        model,
        plan.formats,
        blocks,
        losses(model, blocks, batch),
        base=plan.base,
        seeds=range(seeds),
        batch=batch,
        progress=progress,
    )
