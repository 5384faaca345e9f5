"""Whether a predicted TTFT can be: sums of noisy gains may promise what no device does."""

from __future__ import annotations

import math
from collections.abc import Iterable

from mpq.formats.scheme import mac_time


def implausible(
    predicted_ttft_s: float | None, base_ttft_s: float | None, formats: Iterable[str], base: str
) -> str | None:
    """The sentence on a prediction that cannot be, or None.

    The floor is base's TTFT times the share of base's time that a multiplication takes in the fastest of the plan's `formats`
    (scheme.mac_time): as if everything ran in it, at the speed of its instructions. What was not predicted is not implausible.
    """
    if predicted_ttft_s is None or base_ttft_s is None:
        return None
    if not (math.isfinite(predicted_ttft_s) and math.isfinite(base_ttft_s) and base_ttft_s > 0):
        return (
            f"The predicted TTFT cannot be: {predicted_ttft_s:g} s, of a base of {base_ttft_s:g} s. "
            "Measure the timing table again."
        )
    name = min({base, *formats}, key=lambda f: mac_time(f, base))
    share = mac_time(name, base) / mac_time(base, base)
    if predicted_ttft_s >= share * base_ttft_s:
        return None
    return (
        f"The predicted TTFT of {predicted_ttft_s * 1e3:.4g} ms cannot be: base takes {base_ttft_s * 1e3:.4g} ms, and {name}, the "
        f"plan's fastest format, at best {share:.0%} of that. The gains it adds up were measured on a busy machine: measure them again."
    )
