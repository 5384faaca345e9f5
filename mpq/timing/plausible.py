"""Whether a predicted time can be: sums of noisy gains may promise what no device does."""

from __future__ import annotations

import math
from collections.abc import Iterable

import polars as pl

from mpq.formats.scheme import get_scheme, mac_time

TTFT, TPOT = "TTFT", "time per further token"


def implausible(
    predicted_s: float | None,
    base_s: float | None,
    formats: Iterable[str],
    base: str,
    what: str = TTFT,
) -> str | None:
    """The sentence on a predicted time that cannot be, or None.

    The floor is base's time times the share of it that a multiplication takes in the fastest of the plan's `formats`
    (scheme.mac_time): as if everything ran in it, at the speed of its instructions. Of a further token, for which all weights are
    read, it may be the share of base's bits as well. What was not predicted is not implausible.
    """
    if predicted_s is None or base_s is None:
        return None
    if not (math.isfinite(predicted_s) and math.isfinite(base_s) and base_s > 0):
        return (
            f"The predicted {what} cannot be: {predicted_s:g} s, of a base of {base_s:g} s. "
            "Measure the timing table again."
        )

    def share(name: str) -> float:
        of_time = mac_time(name, base) / mac_time(base, base)
        of_bits = get_scheme(name).bits / get_scheme(base).bits
        return of_time if what == TTFT else min(of_time, of_bits)

    name = min({base, *formats}, key=share)
    if predicted_s >= share(name) * base_s:
        return None
    return (
        f"The predicted {what} of {predicted_s * 1e3:.4g} ms cannot be: base takes {base_s * 1e3:.4g} ms, and {name}, the "
        f"plan's fastest format, at best {share(name):.0%} of that. The gains it adds up were measured on a busy machine: measure them again."
    )


def doubts(results: pl.DataFrame) -> list[str]:
    """What the notes of a table of plans (report.results) say of predicted times that cannot be, each plan's after its name."""
    return [
        f"{row['objective']} by {row['strategy']}: {row['note']}"
        for row in results.iter_rows(named=True)
        if row["note"] and any(f"The predicted {what}" in row["note"] for what in (TTFT, TPOT))
    ]
