"""Is timing one signature as good as timing every group, and what does either cost? `python bench/campaign.py`

A Llama shaped as Llama-3.2-1B (feed-forward of four widths, grouped heads of 64) with half its layers and a quarter of its width, so that
a CPU can time every configuration of every group, the paper's way (arXiv 2505.13060, Sec. 2.3), beside every configuration of every
signature. Both tables choose plans under the same losses and budgets, and all plans are then measured whole, base interleaved.
Tells: measurements and seconds of both, how many of the gains differ by more than their 95 % intervals allow, and for each budget the
TTFT that either table predicted and that its plan has. Last line: JSON.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import polars as pl
from record import folder_of, record
from transformers import LlamaConfig

from mpq.kernels import native_formats
from mpq.models.graph import trace
from mpq.models.partition import groups_table, partition
from mpq.program.gains import gains_et, solve_table
from mpq.store.tables import table
from mpq.timing.design import choices_of, complete, design, half_widths
from mpq.timing.measure import measure, measure_ttft, timing_model

BASE, REPEATS, BUDGETS = "fp32", 5, (0.03, 0.1, 0.3, 0.6, 1.0)
FORMATS = {
    "linear": ("int8",),
    "bgemm": ("int8" if "int8" in native_formats("cpu", "bgemm") else "bf16",),
}
SHAPE: dict[str, Any] = {"base": BASE, "batch": 1, "length": 64}
SLIM = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
)


def apart(groups: pl.DataFrame) -> pl.DataFrame:
    """The groups table with each group a signature of its own."""
    return groups.with_columns(pl.concat_str("signature", pl.lit("@"), "group").alias("signature"))


def choices(groups: pl.DataFrame) -> dict[str, list[tuple[str, ...]]]:
    """For each signature the formats that its ops may take."""
    return {
        str(s): choices_of(rows.filter(pl.col("group") == pl.col("group").min()), FORMATS, BASE)
        for (s,), rows in groups.sort("order").group_by(["signature"], maintain_order=True)
    }


def timed(model: Any, groups: pl.DataFrame) -> tuple[pl.DataFrame, float]:
    """Every configuration of every signature of the table, and the seconds that it took."""
    start = time.perf_counter()
    requests = [(s, design(c, 10**9)) for s, c in choices(groups).items()]
    frame = measure(model, groups, requests, repeats=REPEATS, **SHAPE)
    return frame, time.perf_counter() - start


def losses(groups: pl.DataFrame) -> pl.DataFrame:
    """A loss for each op and format, spread over three orders of magnitude: real ones are, and a plan then mixes formats."""
    rng = np.random.default_rng(0)
    return table(
        "sensitivity",
        [
            {
                "op": op,
                "operand": "input",
                "format": f,
                "noise_model": "ulp",
                "n_samples": 1,
                "loss_mse": float(10 ** rng.uniform(-3, 0)),
                "sensitivity": 1.0,
            }
            for op, kind in groups.select("op", "kind").iter_rows()
            for f in FORMATS.get(kind, ())
        ],
    )


def differences(by_signature: pl.DataFrame, by_group: pl.DataFrame) -> dict[str, Any]:
    """How far the gains of the two tables are apart, against the widths of their intervals."""
    half = (pl.col("gain_ci_high_s") - pl.col("gain_ci_low_s")) / 2
    ours = by_signature.select("signature", "configuration", "gain_s", half.alias("half_s"))
    theirs = by_group.select(
        pl.col("signature").str.split("@").list.first(),
        "configuration",
        "gain_s",
        half.alias("half_s"),
    )
    both = theirs.join(ours, on=["signature", "configuration"], suffix="_ours").filter(
        pl.col("half_s") > 0
    )
    off = (both["gain_s"] - both["gain_s_ours"]).abs()
    allowed = (both["half_s"] ** 2 + both["half_s_ours"] ** 2).sqrt()
    return {
        "gains": both.height,
        "within_interval": float((off <= allowed).mean()),
        "difference_median_ms": float(off.median()) * 1e3,
        "half_interval_median_ms": {
            "by signature": float(both["half_s_ours"].median()) * 1e3,
            "by group": float(both["half_s"].median()) * 1e3,
        },
        "mean_difference_ms": float((both["gain_s"] - both["gain_s_ours"]).mean()) * 1e3,
    }  # type: ignore[arg-type]


def chosen(
    groups: pl.DataFrame, timing: pl.DataFrame, sensitivity: pl.DataFrame, budget: float
) -> dict[str, Any]:
    """The plan of the largest gain under a share of the largest loss: op → format, its gain and the interval's half width (s)."""
    timing = complete(timing, choices(groups), BASE)
    gains = gains_et(groups, timing, sensitivity, BASE, "ulp", "pooled")
    most = gains.group_by("group").agg(pl.col("loss_mse").max())["loss_mse"].sum()
    rows, _ = solve_table(gains, budget * most)
    ops = dict(groups.sort("order").group_by("group", maintain_order=True).agg("op").iter_rows())
    plan = {
        op: f
        for group, formats in rows.select("group", "configuration").iter_rows()
        for op, f in zip(ops[group], formats, strict=True)
        if f != BASE
    }
    return {
        "plan": plan,
        "gain_s": float(rows["gain"].sum()),
        "half_s": half_widths(groups, timing, [plan], BASE)[0],
    }


def main() -> None:
    groups = groups_table(partition(trace(SLIM)), SHAPE["batch"], SHAPE["length"])
    model = timing_model(SLIM, BASE)
    tables, seconds = {}, {}
    for name, frame in (("by signature", groups), ("by group", apart(groups))):
        tables[name], seconds[name] = timed(model, frame)
    sensitivity = losses(groups)
    plans = [
        {"table": name, "budget": b, **chosen(frame, tables[name], sensitivity, b)}
        for b in BUDGETS
        for name, frame in (("by signature", groups), ("by group", apart(groups)))
    ]
    whole = measure_ttft(
        model, [p["plan"] for p in plans], groups=groups, repeats=15, target=0.01, **SHAPE
    )
    found = [
        {
            "budget": p["budget"],
            "table": p["table"],
            "lowered": len(p["plan"]),
            "predicted_gain_ms": p["gain_s"] * 1e3,
            "predicted_half_ms": p["half_s"] * 1e3,
            "gain_ms": r["gain_s"] * 1e3,
            "gain_ci_ms": [r["gain_ci_low_s"] * 1e3, r["gain_ci_high_s"] * 1e3],
            "base_ms": r["base_ttft_s"] * 1e3,
            "ttft_ms": r["ttft_s"] * 1e3,
        }
        for p, r in zip(plans, whole.iter_rows(named=True), strict=True)
    ]
    for name, frame in tables.items():
        frame.write_parquet(folder_of() / f"campaign-{name.replace(' ', '-')}.parquet")
    record(
        "campaign",
        {
            **SHAPE,
            "repeats": REPEATS,
            "measurements": {n: t.height for n, t in tables.items()},
            "seconds": seconds,
            "ratio": {
                "measurements": tables["by group"].height / tables["by signature"].height,
                "seconds": seconds["by group"] / seconds["by signature"],
            },
            "gains": differences(tables["by signature"], tables["by group"]),
            "plans": found,
        },
    )


if __name__ == "__main__":
    main()
