"""What each op costs in each format, in loss MSE and in KL divergence, from the sensitivity table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import polars as pl

from mpq.errors import MpqError

COSTS = ("loss_mse", "loss_mse_stderr", "kl", "kl_stderr")
# loss MSE (nats²), KL (nats per token), each with its standard error
Cost = tuple[float | None, ...]
Losses = dict[tuple[str, str], float]  # (op, format) → what it costs


class Costs:
    """What each op costs in each format, summed over its operands; base costs nothing where the table has no row for it."""

    def __init__(self, sensitivity: pl.DataFrame, noise_model: str, base: str) -> None:
        self.base, self.loss = base, loss_by_op(sensitivity, noise_model)
        of_loss, of_kl = (
            sensitivity.filter(pl.col("noise_model") == model) for model in (noise_model, "actual")
        )
        self.columns = [
            by_op(rows, c) if c in rows.columns else {}
            for c, rows in zip(COSTS[1:], (of_loss, of_kl, of_kl), strict=True)
        ]

    def of(self, ops: Sequence[str], formats: Sequence[str]) -> Cost:
        """The cost of ops in their formats, in the order of COSTS; what was not measured is None.

        Standard errors add as the KL does: samples that are hard for one op are hard for all, and the sum is never less
        than the plan's own. Raises MpqError where the table has no loss MSE.
        """
        pairs = list(zip(ops, formats, strict=True))
        loss = math.fsum(self._loss(op, f) for op, f in pairs)
        return loss, *(self._sum(of, pairs) for of in self.columns)

    def kl(self, formats: Mapping[str, str]) -> float:
        """The KL of a plan (op → format), nats per token. Raises MpqError where an op's was not measured."""
        kl = self.of(list(formats), list(formats.values()))[COSTS.index("kl")]
        if kl is None:
            raise MpqError("The sensitivity table has no kl of some op: measure sensitivity again.")
        return kl

    def _sum(self, of: Losses, pairs: Sequence[tuple[str, str]]) -> float | None:
        if not of:
            return None
        return summed([0.0 if f == self.base else of.get((op, f)) for op, f in pairs])

    def _loss(self, op: str, name: str) -> float:
        if (op, name) not in self.loss:
            if name == self.base:
                return 0.0
            raise MpqError(
                f"The sensitivity table has no row for {op} in {name}: measure sensitivity with that format."
            )
        return self.loss[op, name]


def added(costs: Sequence[Cost]) -> Cost:
    """The costs together; unknown where one of them is."""
    return tuple(summed(column) for column in zip(*costs, strict=True))


def summed(values: Sequence[float | None]) -> float | None:
    """The sum, rounded once; None where one of the values is not known."""
    known = [v for v in values if v is not None]
    return math.fsum(known) if len(known) == len(values) else None


def loss_by_op(sensitivity: pl.DataFrame, noise_model: str) -> Losses:
    """Loss MSE (nats²) of each op in each format, summed over its operands; infinite where the format overflows.

    Raises MpqError where one is no number, where a row stands twice, and where the table has nothing of the noise model.
    """
    of_model = sensitivity.filter(pl.col("noise_model") == noise_model)
    if of_model.is_empty() and not sensitivity.is_empty():
        others = ", ".join(sorted(sensitivity["noise_model"].unique().to_list()))
        raise MpqError(
            f"The sensitivity table has nothing of the noise model {noise_model}, but of {others}: "
            "choose one of these, or measure sensitivity again."
        )
    once = ["op", "operand", "format"]
    if set(once) <= set(of_model.columns) and of_model.select(once).is_duplicated().any():
        raise MpqError(
            "The sensitivity table has an operand of an op twice in one format: give the table of one measurement."
        )
    losses = by_op(of_model, "loss_mse")
    for (op, name), loss in losses.items():
        if math.isnan(loss):
            raise MpqError(
                f"The sensitivity table has the loss MSE {loss} for {op} in {name}: measure sensitivity again."
            )
    return losses


def by_op(rows: pl.DataFrame, column: str) -> Losses:
    """The column summed over an op's operands; left out are formats in which one of those that the op has was not measured."""
    known = pl.when(pl.col(column).null_count() == 0).then(pl.col(column).sum())
    every = rows.group_by("op", "format").agg(known.alias(column), operands=pl.len())
    all_there = pl.col("operands") == pl.col("operands").max().over("op")
    summed = every.filter(all_there).drop_nulls(column)
    return {(op, name): v for op, name, v in summed.select("op", "format", column).iter_rows()}
