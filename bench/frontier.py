"""How long the whole frontier of an 8 B model takes: `python bench/frontier.py [points]`. Llama-3.1-8B's groups, losses and
times made up: MAC time over its 289 ops in three formats, and measured time over its groups with each configuration of two."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np

from mpq.models.checkpoint import load_config
from mpq.models.graph import trace
from mpq.models.partition import groups_table, partition
from mpq.program.frontier import frontier

EXAMPLE = Path(__file__).parent.parent / "examples" / "llama-3.1-8b"


def programs(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(group, gain, cost) of each objective: costs add up over ops and span decades, times nearly add up."""
    rng = np.random.default_rng(seed)
    groups = groups_table(partition(trace(load_config(EXAMPLE))), 1, 512)
    ops = groups.filter(groups["kind"] != "other")
    macs = ops["macs"].to_numpy()
    kl = 10.0 ** rng.uniform(-7, -3, len(macs))[:, None] * np.array([0.0, 1.0, 0.3])
    gain = macs[:, None] * np.array([0.0, 0.5, 0.45])
    of_ops = (np.repeat(np.arange(len(macs)), 3), gain.ravel(), kl.ravel())
    number, rows = ops["group"].to_numpy(), []
    for group in np.unique(number):
        at = np.flatnonzero(number == group)
        for lowered in itertools.product((0, 1), repeat=len(at)):
            worth = (gain[at, 1] * lowered).sum() * rng.uniform(0.8, 1.1)
            rows.append((group, worth, (kl[at, 1] * lowered).sum()))
    table = np.array(rows)
    return {"tt": of_ops, "et": (table[:, 0].astype(np.int64), table[:, 1], table[:, 2])}


def main(points: int = 200) -> None:
    result: dict[str, object] = {"points": points}
    for objective, (group, gain, cost) in programs().items():
        start = time.perf_counter()
        found = frontier(group, gain, cost, points)
        result[objective] = {
            "seconds": round(time.perf_counter() - start, 3),
            "groups": len(np.unique(group)),
            "rows": len(group),
            "found": len(found),
            "certified": sum(point.certified for point in found),
        }
    from record import folder_of, recorded  # after the solves: torch comes with it

    (folder_of() / "frontier.json").write_text(
        json.dumps(recorded("frontier", result), indent=1) + "\n", encoding="utf-8"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
