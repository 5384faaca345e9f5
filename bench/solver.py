"""How long the integer program takes at a size far beyond any model's: `python bench/solver.py [groups] [rows of each]`."""

from __future__ import annotations

import json
import sys

import numpy as np

from mpq.program.solver import solve


def instance(
    groups: int, rows: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Configurations of rows.bit_length()-1 ops each: losses add up over ops, times nearly do; the first row is all-base."""
    rng = np.random.default_rng(seed)
    ops = rows.bit_length() - 1
    lowered = (np.arange(rows)[:, None] >> np.arange(ops)) & 1
    cost = (10.0 ** rng.uniform(-12, -4, (groups, 1, ops)) * lowered).sum(2)
    gain = (10.0 ** rng.uniform(-7, -4, (groups, 1, ops)) * lowered).sum(2) * rng.uniform(
        0.7, 1.1, (groups, rows)
    )
    return (
        np.repeat(np.arange(groups), rows),
        gain.ravel(),
        cost.ravel(),
        float(cost.max(1).sum() * 0.05),
    )


if __name__ == "__main__":
    groups, rows = (int(a) for a in (sys.argv[1:] + ["10000", "32"][len(sys.argv) - 1 :]))
    solution = solve(*instance(groups, rows))
    result = {
        "seconds": round(solution.seconds, 3),
        "groups": groups,
        "rows": groups * rows,
        "status": solution.status,
    }
    result |= {"gap": solution.gap, "solver": solution.solver, "note": solution.note}
    from record import folder_of, recorded  # after the solve: torch comes with it

    (folder_of() / "solver.json").write_text(
        json.dumps(recorded("solver", result), indent=1) + "\n", encoding="utf-8"
    )
    print(json.dumps(result))
