"""Whether the machine changed speed between the timing of configurations and that of whole plans: the base model's TTFT tells.

A prediction is made at the speed of the first, a measurement at that of the second, and between them lie minutes or, with stored timings,
months. The base is measured beside both, so that the machine's part of an error can be told from the time model's, and plans that were
measured at different speeds can be compared.
"""

from __future__ import annotations

import polars as pl

DRIFT = 0.05  # a change of the base's TTFT (median over plans) above it is told; a range over plans above twice that, too


def carried(plans: pl.DataFrame) -> pl.DataFrame:
    """Rows with `measured_ttft_s`, the base beside it (`base_ttft_s`) and at timing (`solved_base_ttft_s`), and two columns more, in seconds at
    the speed of timing: `carried_ttft_s`, what was measured times the base at timing over the base beside it, and `carried_gain_s`, what the
    plan gained on that base.

    Null where nothing was measured; at their own speed where nothing says another.
    """
    speed = (pl.col("solved_base_ttft_s") / pl.col("base_ttft_s")).fill_null(1.0)
    measured = pl.col("measured_ttft_s")
    return plans.with_columns(
        carried_ttft_s=measured * speed, carried_gain_s=(pl.col("base_ttft_s") - measured) * speed
    )


def drift_of(plans: pl.DataFrame) -> str | None:
    """The sentence on a machine that changed speed, or None of one that did not: its base's TTFT then and beside the plans, and what the
    error of predicted TTFT is as it stands and at one speed. `plans` is report.results_table's or plan_results's."""
    times = ("predicted_ttft_s", "carried_ttft_s", "base_ttft_s", "solved_base_ttft_s")
    both = plans.filter(
        pl.all_horizontal((pl.col(c).is_finite() & (pl.col(c) > 0)).fill_null(False) for c in times)
    )
    if both.is_empty():
        return None
    then, beside = pl.col("solved_base_ttft_s"), pl.col("base_ttft_s")
    predicted = pl.col("predicted_ttft_s")
    told = both.select(
        then=then.median() * 1e3,
        beside=beside.median() * 1e3,
        low=beside.min() * 1e3,
        high=beside.max() * 1e3,
        times=(beside / then).median(),
        raw=(predicted / pl.col("measured_ttft_s") - 1).abs().median(),
        own=(predicted / pl.col("carried_ttft_s") - 1).abs().median(),
    ).row(0, named=True)
    if abs(told["times"] - 1) <= DRIFT and told["high"] - told["low"] <= 2 * DRIFT * told["beside"]:
        return None
    return (
        f"The machine changed speed: base took {told['then']:.4g} ms while configurations were timed, and {told['low']:.4g} to {told['high']:.4g} ms "
        f"(median {told['beside']:.4g}) beside the plans. Predicted TTFT is off by {told['raw']:.1%} of the measured one as it stands, and by {told['own']:.1%} "
        f"at one speed (medians)."
    )
