"""What rounding an operand to each scheme's format costs, beside E4M3 with one scale a row, and summing all their errors.

    python bench/rounding.py [--rounds 15]

One thread, its CPU seconds; every round runs each format once, so that what the machine does meanwhile meets all of them. Writes
rounding.json beside the other results of this device; the last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from record import record

from mpq.formats.format import BLOCKED, FORMATS, Format
from mpq.kernels.errors import weighted_sums
from mpq.kernels.rounding import rounded

SHAPE = (512, 4096)
BESIDE = "fp8_e4m3"


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    run()
    return time.process_time() - start


def ratios(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Of each way its time over BESIDE's in the same round: median and quartiles, and its median in ms."""
    for run in ways.values():
        run()
    took = {name: [] for name in ways}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for name, run in ways.items():
            took[name].append(seconds(run))
    found = {}
    for name, of in took.items():
        shares = [a / b for a, b in zip(of, took[BESIDE], strict=True)]
        low, middle, high = quantiles(shares, n=4)
        found[name] = {
            "times_e4m3": round(middle, 2),
            "low": round(low, 2),
            "high": round(high, 2),
            "ms": round(median(of) * 1e3, 2),
        }
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    x, g = (torch.randn(SHAPE, generator=draw) for _ in range(2))
    formats = [f for f in (*FORMATS.values(), *BLOCKED.values()) if f.needs_scale]

    def round_to(fmt: Format) -> Callable[[], object]:
        return lambda: rounded(x, fmt, "row")

    def sum_of(fmt: Format) -> Callable[[], object]:
        return lambda: weighted_sums(x, [fmt], "row")(g)

    result = {
        "shape": list(SHAPE),
        "rounding": ratios({f.name: round_to(f) for f in formats}, options.rounds),
        "errors": ratios({f.name: sum_of(f) for f in formats}, options.rounds),
    }
    record("rounding", result)


if __name__ == "__main__":
    main()
