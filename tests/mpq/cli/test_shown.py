"""What people see of tables: few columns, the numbers those of the tables."""

from __future__ import annotations

import polars as pl
import pytest
from synthetic import BASE, LOWER, make_run

from mpq.cli import shown

RUN = make_run(layers=2)


def test_sensitivity_has_a_row_for_each_op() -> None:
    """Operands add up, base is left out, the most sensitive op comes first."""
    told = shown.sensitivity(RUN["sensitivity"], BASE)
    assert told.columns == ["op", *LOWER]
    assert told.height == RUN["groups"].height
    top = told.row(0, named=True)
    rows = [
        r
        for r in RUN["sensitivity"].iter_rows(named=True)
        if (r["op"], r["noise_model"]) == (top["op"], "ulp")
    ]
    assert {r["operand"] for r in rows} in ({"input", "weight"}, {"lhs", "rhs"})
    for f in LOWER:
        assert top[f] == pytest.approx(sum(r["loss_mse"] for r in rows if r["format"] == f))
    assert max(told[LOWER[0]]) == top[LOWER[0]]


def test_groups_tell_shapes() -> None:
    """A linear by its features, as what stays in base; experts by how many there are, too; attention's products by their heads."""
    ends = pl.col("op").str.ends_with
    kinds = (
        pl.when(ends("layers.0.mlp.down_proj"))
        .then(pl.lit("other"))
        .when(ends("layers.0.mlp.up_proj"))
        .then(pl.lit("experts"))
        .otherwise("kind")
    )
    many = pl.when(ends("layers.0.mlp.up_proj")).then(4 * 512 * 512).otherwise("parameters")
    groups = RUN["groups"].with_columns(kind=kinds, parameters=many)
    told = {row["op"]: row["shape"] for row in shown.groups(groups).iter_rows(named=True)}
    assert told["model.layers.0.mlp.up_proj"] == "4 × 512 → 512"
    assert told["model.layers.0.mlp.down_proj"] == "512 → 512"
    assert told["lm_head"] == "512 → 512"
    assert told["model.layers.1.self_attn.qk_matmul"] == "8 heads"


def test_long_names_of_strategies_break_between_words() -> None:
    """`uniform_int8_but_head` does not fit beside the numbers in 80 characters; other names stay as they are."""
    names = ["ip_et", "uniform_int8", "uniform_fp8_e4m3_but_head"]
    of_plans = dict.fromkeys(
        ("predicted_loss_mse", "measured_loss_mse", "predicted_ttft_s", "measured_ttft_s"), 1e-3
    )
    rows = pl.DataFrame(
        [
            {"objective": "et", "strategy": name, "tau": 0.01, "kl_bound": None, **of_plans}
            | {"base_ttft_s": 0.1, "share_lowered": 0.5}
            for name in names
        ]
    )
    assert shown.results(rows)["strategy"].to_list() == [
        "ip_et",
        "uniform int8",
        "uniform fp8_e4m3 but head",
    ]
