"""The time of an answer: that to its first token, and that of each token after it.

A request of `output` tokens takes TTFT + (output - 1) × the time per output token; with one token it is the paper's prefill alone.
Both parts are measured for each configuration, and their sum is the time to gain: what prefill gains decode may lose. Tables of
longer answers have the columns of `SCHEMA` more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from mpq.timing.pairs import Pairs, gain_statistics

# tpot: time per output token after the first; gains are of one instance, as gain_s = ttft_gain_s + (output - 1) tpot_gain_s
SCHEMA = {
    "output": pl.Int64,
    "tpot_s": pl.Float64,
    "base_tpot_s": pl.Float64,
    "ttft_gain_s": pl.Float64,
    "tpot_gain_s": pl.Float64,
}


@dataclass(frozen=True)
class Further:
    """What a prediction needs to know of the tokens after the first: how many an answer has with it, base's time for one, and
    what lowered neighbours gain of it together (design.interaction)."""

    output: int
    base_tpot_s: float
    interaction_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens after the first."""
        return self.output - 1


def parts_of(pairs: Pairs, output: int, instances: int = 1, base: bool = False) -> dict[str, Any]:
    """The columns of SCHEMA of runs that answered with `output` tokens; none for one. `base` says that they are of base itself."""
    if pairs.first_s is None:
        return {}
    gains = [0.0 if base else gain_statistics(*part)[0] / instances for part in pairs.parts]
    base_s, config_s = (float(np.median(s)) / (output - 1) for s in pairs.parts[1])
    return {
        "output": output,
        "tpot_s": base_s if base else config_s,
        "base_tpot_s": base_s,
        "ttft_gain_s": gains[0],
        "tpot_gain_s": gains[1] / (output - 1),
    }


def answers(timing: pl.DataFrame) -> bool:
    """Whether a table is of answers of several tokens."""
    return "tpot_s" in timing.columns


def base_answer_of(timing: pl.DataFrame) -> pl.Expr:
    """Base's time for a whole answer (s), in each row of a timing table."""
    base = pl.col("base_ttft_s")
    if answers(timing):
        base = base + (pl.col("output") - 1) * pl.col("base_tpot_s")
    return base


def base_answer_s(timing: pl.DataFrame) -> float:
    """Base's time for a whole answer: the median over the table's rows."""
    return float(timing.select(base_answer_of(timing).median()).item())


def further_of(timing: pl.DataFrame, interaction_s: float = 0.0) -> Further | None:
    """What a timing table says of the tokens after the first; None of one of prefills alone."""
    if not answers(timing):
        return None
    told = timing.select(pl.col("output").max(), pl.col("base_tpot_s").median())
    output, base_tpot_s = told.row(0)
    return Further(output, base_tpot_s, interaction_s)


def predicted_parts(
    measured: pl.DataFrame, gain_s: np.ndarray, tpot_gain_s: np.ndarray
) -> pl.DataFrame:
    """The columns of SCHEMA of configurations never measured, from their predicted gains; `measured` are others of the signature."""
    output, instances = measured.select("output", "instances").row(0)
    base_s = float(measured.select(pl.col("base_tpot_s").median()).item())
    columns = {
        "output": np.full(len(gain_s), output),
        "tpot_s": base_s - instances * tpot_gain_s,
        "base_tpot_s": np.full(len(gain_s), base_s),
        "ttft_gain_s": gain_s - (output - 1) * tpot_gain_s,
        "tpot_gain_s": tpot_gain_s,
    }
    return pl.DataFrame(columns, schema=SCHEMA)
