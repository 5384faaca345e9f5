"""The table `effects`: what rounding each op's weight does to the loss of each sample, in first
order.

Rounding a weight is one fixed change, not a fresh one for each sample: a_il = Σ_n ∂g_i/∂w_n
(Q_f(w_n) − w_n) has a sign, which the errors of a sample's ops keep when they add
(program/signed.py). It comes out of the backward pass of the losses' squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl
import torch
from torch import Tensor

from mpq.formats.scheme import Scheme
from mpq.store.tables import SCHEMAS, validate


def effects_table(
    effects: Mapping[str, Sequence[tuple[int, Tensor]]], samples: int, schemes: Sequence[Scheme]
) -> pl.DataFrame:
    """The table of each op's batches, the first sample's number and (samples, schemes) nats each:
    infinite where the format overflows, 0 of the samples that did not run through the op."""
    found = {}
    for op, batches in effects.items():
        values = torch.zeros(samples, len(schemes), dtype=torch.float64)
        for first, batch in batches:
            values[first : first + len(batch)] = batch
        found[op] = values.T
    columns = [
        pl.DataFrame({"effect": values.nan_to_num(nan=torch.inf).numpy()})
        .with_row_index("sample")
        .with_columns(pl.lit(op).alias("op"), pl.lit(scheme.name).alias("format"))
        for op, of_op in found.items()
        for scheme, values in zip(schemes, of_op, strict=True)
        if scheme.rounds("weight")
    ]
    return validate("effects", pl.concat(columns or [pl.DataFrame(schema=SCHEMAS["effects"])]))


def joined(effects: Sequence[pl.DataFrame], losses: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Shards' tables as one: samples are numbered on from shard to shard, by how many each
    shard's `loss` table has."""
    before, shards = 0, []
    for frame, loss in zip(effects, losses, strict=True):
        shards.append(validate("effects", frame).with_columns(pl.col("sample") + before))
        before += loss["n_samples"][0]
    return pl.concat(shards)
