"""Experts that calibration sends no token to: of them nothing is known, which the table and the log say.

The column `expert_tokens` of a sensitivity table has, for an op of experts, how many tokens each of them got, in the
model's order. An expert's share of the loss MSE comes from its tokens: without any it adds nothing, whatever its format does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import polars as pl

log = logging.getLogger("mpq")
COLUMN = "expert_tokens"


def with_tokens(sensitivity: pl.DataFrame, tokens: Mapping[str, Sequence[int]]) -> pl.DataFrame:
    """The table and its column `expert_tokens`, of `tokens` by op; without ops of experts the table as it is."""
    if not tokens:
        return sensitivity
    of_op = [list(tokens[op]) if op in tokens else None for op in sensitivity["op"]]
    return sensitivity.with_columns(pl.Series(COLUMN, of_op, dtype=pl.List(pl.Int64)))


def tokens_of(*sensitivities: pl.DataFrame) -> dict[str, list[int]]:
    """Op → how many tokens each of its experts got in all these tables together."""
    found: dict[str, list[int]] = {}
    for table in sensitivities:
        if COLUMN not in table.columns:
            continue
        rows = table.select("op", COLUMN).drop_nulls().unique("op", maintain_order=True)
        for op, tokens in rows.iter_rows():
            before = found.get(op, [0] * len(tokens))
            found[op] = [a + b for a, b in zip(before, tokens, strict=True)]
    return found


def warn_unseen(sensitivity: pl.DataFrame) -> None:
    """Say in the log which ops have experts without a token, and what that means."""
    tokens = tokens_of(sensitivity)
    unseen = {op: n for op, counts in tokens.items() if (n := counts.count(0))}
    if not unseen:
        return
    worst = max(unseen, key=lambda op: unseen[op])
    log.warning(
        "Calibration sends no token to %d of %d experts, in %d of %d ops (%s: %d of %d; see %s in the sensitivity table): what "
        "rounding them does is not known and counts as nothing, so calibrate with more text, or pin these ops to base.",
        sum(unseen.values()),
        sum(map(len, tokens.values())),
        len(unseen),
        len(tokens),
        worst,
        unseen[worst],
        len(tokens[worst]),
        COLUMN,
    )
