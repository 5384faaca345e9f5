"""What it costs to obey each constraint: the plan as it is, and as the program would make it without
that one (program/prices.py)."""

from __future__ import annotations

from typing import Any

from mpq.program.plan import has_tau
from mpq.report.results import OBJECTIVES, Gain, Tables, bound_of, results_table
from mpq.report.sheets import Sheet, amount


def prices(tables: Tables) -> Sheet:
    """A row for each constraint of each plan that the program made, the dearest constraint first.

    It has none where nothing was constrained.
    """
    found = tables.get("prices")
    rows = []
    if found is not None and not found.is_empty():
        bounds = {
            (row["objective"], row["strategy"], row["tau"]): bound_of(row)
            for row in results_table(tables).iter_rows(named=True)
            if has_tau(row["strategy"])
        }
        places = {objective: i for i, objective in enumerate(OBJECTIVES)}

        def order(row: dict[str, Any]) -> tuple[Any, ...]:
            dear = row["gain"] - row["gain_without"]
            return places[row["objective"]], row["strategy"], row["tau"], dear

        def shown(objective: str, gain: float) -> str:
            return amount(objective, Gain(gain, None, None, False))

        rows = [
            {
                **row,
                "bound": bounds.get((row["objective"], row["strategy"], row["tau"])),
                "with": shown(row["objective"], row["gain"]),
                "without": shown(row["objective"], row["gain_without"]),
                "share": row["gain_without"] / row["gain"] - 1 if row["gain"] > 0 else None,
            }
            for row in sorted(found.iter_rows(named=True), key=order)
        ]
    return Sheet(
        "prices",
        "The price of each constraint: what the plan gains and costs by prediction, and what it would "
        "without that constraint, solved again. A plan of least loss would cost less instead.",
        [
            ("Strategy", "strategy", ""),
            ("For", "objective", ""),
            ("Bound", "bound", ""),
            ("Constraint", "constraint", ""),
            ("Gain", "with", ""),
            ("without it", "without", ""),
            ("more", "share", "percent"),
            ("KL (nats per token)", "kl", "sci"),
            ("without it", "kl_without", "sci"),
            ("Loss MSE (nats²)", "loss_mse", "sci"),
            ("without it", "loss_mse_without", "sci"),
        ],
        rows,
    )
