"""Whether the machine changed speed between the timing of configurations and that of whole plans: the base model's TTFT tells.

A prediction is made at the speed of the first, a measurement at that of the second, and between them lie minutes or, with stored timings,
months. The base is measured beside both, so that the machine's part of an error can be told from the time model's.
"""

from __future__ import annotations

import polars as pl

DRIFT = 0.05  # a change of the base's TTFT (median over plans) above it is told


def carried(plans: pl.DataFrame) -> pl.DataFrame:
    """Rows of report.results_table or plan_results with two columns more, in seconds at the speed of timing: `carried_ttft_s`, what was
    measured times the base at timing over the base beside it, and `carried_gain_s`, what the plan gained on that base.

    Null where nothing was measured; at their own speed where nothing says another.
    """
    speed = (pl.col("solved_base_ttft_s") / pl.col("base_ttft_s")).fill_null(1.0)
    measured = pl.col("measured_ttft_s")
    return plans.with_columns(carried_ttft_s=measured * speed, carried_gain_s=(pl.col("base_ttft_s") - measured) * speed)


def drift_of(plans: pl.DataFrame) -> str | None:
    """The sentence on a machine that changed speed, or None of one that did not: by how much, and what the error of predicted TTFT is
    with and without it."""
    both = carried(plans).filter(
        pl.all_horizontal(pl.col("predicted_ttft_s", "measured_ttft_s", "solved_base_ttft_s").is_not_null())
    )
    if both.is_empty():
        return None
    predicted, then, beside = pl.col("predicted_ttft_s"), pl.col("solved_base_ttft_s"), pl.col("base_ttft_s")
    base_then, base_beside, change, error, own = both.select(
        then.median(),
        beside.median().alias("beside"),
        (beside / then - 1).median().alias("change"),
        (predicted / pl.col("measured_ttft_s") - 1).abs().median().alias("error"),
        (predicted / pl.col("carried_ttft_s") - 1).abs().median().alias("own"),
    ).row(0)
    if abs(change) <= DRIFT:
        return None
    return (
        f"The machine was {abs(change):.0%} {'slower' if change > 0 else 'faster'} beside the plans than while configurations were timed: its base took "
        f"{1e3 * base_then:.4g} ms then and {1e3 * base_beside:.4g} ms now (medians). Predicted TTFT is of then, and off by {error:.1%} of the measured one; "
        f"at one speed it is off by {own:.1%}."
    )
