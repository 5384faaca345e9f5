"""The task that makes gains of timing tables: it plans with what the spec says of a gain, from tables of workers that know different things."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from prefect.logging import disable_run_logger

from mpq.program.constraints import Allowed
from mpq.store.entries import Store
from mpq.store.tables import table
from mpq.tasks import planning
from mpq.tasks.stage import read
from mpq.timing.design import complete

CHOICES = {"pair": [("fp32", "bf16"), ("fp32", "bf16")]}
GAINS = {
    ("fp32", "fp32"): (0.0, 0.0),
    ("bf16", "fp32"): (1e-3, 2e-4),
    ("fp32", "bf16"): (2e-3, 2e-4),
    ("bf16", "bf16"): (9e-3, 6e-3),
}


def timing() -> list[pl.DataFrame]:
    """Four gains (s) with the half widths of their intervals, on two workers; only the first knows its clock."""
    rows = table(
        "timing",
        [
            {
                "signature": "pair",
                "group": 0,
                "configuration": list(c),
                "instances": 1,
                "repeats": 7,
                "ttft_s": 0.1 - gain,
                "base_ttft_s": 0.1,
                "gain_s": gain,
                "gain_ci_low_s": gain - half,
                "gain_ci_high_s": gain + half,
                "device": "d",
                "method": "signature",
                "batch": 1,
                "length": 1,
                "load_average": 0.0,
                "steal_share": 0.0,
                "disturbed": 0,
                "measured": 0,
                "significant": gain > half,
                "mode": "eager",
            }
            for c, (gain, half) in GAINS.items()
        ],
    )
    return [rows[:2].with_columns(clock_mhz=3000.0), rows[2:]]


@pytest.mark.parametrize(
    ("bound", "column"),
    [("pooled", "pooled_gain_s"), ("median", "gain_s"), ("lower", "gain_ci_low_s")],
)
def test_gains_are_what_the_bound_says(bound: str, column: str, tmp_path: Path) -> None:
    """Pooled, the doubtful 9 ms of both lowered come down towards what either gains; by other bounds each row stands alone."""
    store, parts = Store(tmp_path.as_uri()), timing()
    groups = table(
        "groups",
        [
            {
                "group": 0,
                "order": i,
                "op": f"op{i}",
                "kind": "linear",
                "signature": "pair",
                "in_features": 8,
                "out_features": 8,
                "macs": 1,
                "parameters": 64,
                "heads": 0,
                "kv_heads": 0,
            }
            for i in range(2)
        ],
    )
    losses = table(
        "sensitivity",
        [
            {
                "op": f"op{i}",
                "operand": "input",
                "format": "bf16",
                "noise_model": "ulp",
                "n_samples": 1,
                "loss_mse": 1.0,
                "sensitivity": 1.0,
            }
            for i in range(2)
        ],
    )
    inputs = {
        "objective": "et",
        "groups": store.write_table("groups", "g", groups),
        "sensitivity": store.write_table("sensitivity", "s", losses),
        "timing": [store.write_table("timing", f"t{i}", part) for i, part in enumerate(parts)],
        "formats": ["bf16"],
        "base": "fp32",
        "noise_model": "ulp",
        "bound": bound,
        "allowed": Allowed(
            "fp32", {f"op{i}": ("fp32", "bf16") for i in range(2)}, (("op0",), ("op1",))
        ),
    }
    with disable_run_logger():
        found = read(
            planning.build_gains.task.fn(bound, tmp_path.as_uri(), "gains", inputs)["gains"]
        )
    whole = complete(pl.concat(parts, how="diagonal_relaxed"), CHOICES, "fp32")
    assert found["configuration"].to_list() == whole["configuration"].to_list()
    assert found["gain"][1:].to_list() == pytest.approx(whole[column][1:].to_list())
    assert found["gain"][0] == 0
    if bound == "pooled":
        assert 2e-3 < found["gain"][3] < 8.5e-3
