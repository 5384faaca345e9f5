"""Is the time model right? Gains of groups against sums of their ops', TTFT of whole plans predicted and measured, and the cost.

    python bench/timing.py [demo | wide | checkpoint folder …]

On this machine's CPU, base FP32 with BF16 and INT8 native, for two shapes with random weights: the demo's, and a Llama of width 1024
whose products take longer than what is around them. Plans: random ones of every share of lowered ops, the fastest by the gains, and
the fastest up to the middle of the model. Writes timing-<shape>.json, tables and two pictures beside the other results of this
device; each shape's last line is JSON. Sections and figure numbers are those of arXiv 2505.13060.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from record import folder_of, record
from transformers import LlamaConfig

from mpq.design import anchors, choices_of, complete, design, half_widths, interaction, neighbours, sums
from mpq.formats import get_format
from mpq.gains import gains_et
from mpq.graph import trace
from mpq.kernels import Kind, native_formats
from mpq.model import load_config
from mpq.partition import groups_table, partition
from mpq.tables import table
from mpq.timing import measure, measure_ttft, timing_model

BASE = "fp32"
KINDS: tuple[Kind, ...] = ("linear", "bgemm")
FORMATS = {kind: tuple(f for f in ("bf16", "int8") if f in native_formats("cpu", kind)) for kind in KINDS}
REPEATS, LIMIT, PLANS = 9, 64, 24
DEMO = Path(__file__).parent.parent / "examples" / "demo"
WIDE = LlamaConfig(
    vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4
)
Choices: TypeAlias = dict[str, list[tuple[str, ...]]]
LLAMA_1B = LlamaConfig(  # Llama-3.2-1B's published config.json
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip


def r2(measured: np.ndarray, error: np.ndarray) -> float:
    """The share of what was measured that is explained up to `error`."""
    return float(1 - (error**2).sum() / ((measured - measured.mean()) ** 2).sum())


def fit(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Least-squares scale and bias of y on x: the fitted values and R²."""
    scale, bias = np.polyfit(x, y, 1)
    fitted = scale * x + bias
    return fitted, r2(y, y - fitted)


def figure_1(timing: pl.DataFrame, groups: pl.DataFrame) -> tuple[Figure, dict[str, Any]]:
    """The largest group: measured gain of each configuration against the sum of its ops' own, and against MACs."""
    signature = timing.group_by("signature").len().sort("len")["signature"][-1]
    rows = timing.filter(pl.col("signature") == signature)
    ops = groups.filter(pl.col("signature") == signature, pl.col("group") == pl.col("group").min().over("signature")).sort(
        "order"
    )
    gains = {tuple(r["configuration"]): r["gain_s"] for r in rows.iter_rows(named=True)}
    base = (BASE,) * ops.height
    single = {(i, c[i]): g for c, g in gains.items() for i in range(len(c)) if sum(f != BASE for f in c) == 1 and c[i] != BASE}
    time_of = {f: get_format(f).mac_time for f in {f for c in gains for f in c}}
    many = [c for c in gains if c != base]
    y = np.array([gains[c] for c in many]) * 1e3
    sums = np.array([sum(single[i, f] for i, f in enumerate(c) if f != BASE) for c in many]) * 1e3
    macs = np.array([sum((time_of[BASE] - time_of[f]) * m for f, m in zip(c, ops["macs"], strict=True)) for c in many])
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    found: dict[str, Any] = {"signature": signature, "configurations": len(many)}
    for axes, x, name in zip(figure.subplots(1, 2), (sums, macs), ("sum of per-op gains (ms)", "gain by MACs"), strict=True):
        fitted, r2 = fit(x, y)
        axes.plot(x, y, "o", color="#0072b2", markerfacecolor="none", label="measured")
        axes.plot(x[np.argsort(x)], fitted[np.argsort(x)], color="#d55e00", label=f"least squares, R² = {r2:.3f}")
        axes.set_xlabel(name)
        axes.set_ylabel("measured gain of the group (ms)")
        axes.legend(frameon=False)
        found[f"r2 of {name}"] = r2
    slope = float(np.sum(sums * y) / np.sum(sums**2))
    return figure, found | {"measured gain over sum of per-op gains": slope}


def random_plan(groups: pl.DataFrame, share: float, rng: random.Random) -> dict[str, str]:
    """Each op lowered with probability `share`, to a format of its kind."""
    return {op: rng.choice(FORMATS[kind]) for op, kind in groups.select("op", "kind").iter_rows() if rng.random() < share}


def half(plan: dict[str, str], groups: pl.DataFrame) -> dict[str, str]:
    """The plan up to the middle of the model, base after it."""
    first = groups.sort("order").head(groups.height // 2)["op"]
    return {op: plan[op] for op in first if op in plan}


def figure_3a(tested: pl.DataFrame) -> Figure:
    """TTFT of whole plans, measured against predicted."""
    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    predicted, measured = tested["predicted_ttft_s"].to_numpy() * 1e3, tested["ttft_s"].to_numpy() * 1e3
    axes.plot(predicted, measured, "o", color="#0072b2", markerfacecolor="none", label="plans")
    ends = [measured.min() * 0.95, measured.max() * 1.05]
    axes.plot(ends, ends, color="#444", linewidth=1, label="equal")
    axes.set_xlabel("TTFT, predicted (ms)")
    axes.set_ylabel("TTFT, measured (ms)")
    axes.legend(frameon=False)
    return figure


def run(name: str, config: Any, batch: int, length: int) -> None:
    """Measure one shape and record it."""
    groups = groups_table(partition(trace(config)), batch, length)
    choices: Choices = {}
    for (signature, _), rows in groups.sort("order").group_by(["signature", "group"], maintain_order=True):
        choices.setdefault(str(signature), choices_of(rows, FORMATS, BASE))
    model = timing_model(config, BASE)
    shape: dict[str, Any] = {"base": BASE, "batch": batch, "length": length}
    requests = [(s, design(c, LIMIT)) for s, c in choices.items()]
    timing = measure(model, groups, requests, repeats=REPEATS, target=0.01, cap=3 * REPEATS, **shape)

    no_loss = table("sensitivity", [
        {"op": op, "operand": "input", "format": f, "noise_model": "ulp", "n_samples": 1, "loss_mse": 0.0, "sensitivity": 0.0}
        for op in groups["op"] for f in ("bf16", "int8")
    ])  # fmt: skip
    gains = gains_et(groups, complete(timing, choices, BASE), no_loss, BASE, "ulp")
    rng = random.Random(0)
    whole = anchors(groups, gains, BASE)
    named = {"the fastest": whole[0], "the fastest, first half": half(whole[0], groups)}
    plans = [*whole, *named.values(), *(random_plan(groups, (i + 1) / PLANS, rng) for i in range(PLANS))]
    seconds = measure_ttft(model, plans, groups=groups, repeats=REPEATS + 2, target=0.005, cap=4 * REPEATS, **shape)
    total = sums(groups, gains, plans, BASE)
    pairs = [neighbours(groups, plan, BASE) for plan in plans]
    term = interaction(pairs[: len(whole)], total[: len(whole)], seconds["gain_s"][: len(whole)].to_list())
    base_s = seconds["base_ttft_s"]
    result = seconds.with_columns(
        (base_s - pl.Series(total)).alias("additive_ttft_s"), (base_s - pl.Series(total) - term * pl.Series(pairs)).alias("predicted_ttft_s"),
    )  # fmt: skip
    by_name = list(zip(named, result[len(whole) :].iter_rows(named=True), strict=False))
    tested = result[len(whole) + 1 :]  # the first ones anchor the interaction term, and the fastest is one of them measured again
    errors = {n: (tested[f"{n}_ttft_s"] / tested["ttft_s"] - 1).abs() for n in ("additive", "predicted")}
    measured_gain, predicted_gain = tested["gain_s"].to_numpy(), (tested["base_ttft_s"] - tested["predicted_ttft_s"]).to_numpy()
    own = (tested["gain_ci_high_s"] - tested["gain_ci_low_s"]).to_numpy() / 2
    noise = np.hypot(own, half_widths(groups, timing, plans, BASE)[-tested.height :]) / 1.96  # standard errors, were they normal
    ours = sum(len(design(c, 10**9)) for c in _choices_1b().values())
    paper = sum(len(design(c, 10**9)) for c in _choices_1b(every=True).values())

    out = folder_of()
    figure, first = figure_1(timing.filter(pl.col("repeats") > 0), groups)
    figure.savefig(out / f"timing-{name}-figure-1.png", dpi=150)
    figure_3a(tested).savefig(out / f"timing-{name}-figure-3a.png", dpi=150)
    timing.write_parquet(out / f"timing-{name}.parquet")
    result.with_columns(pl.Series("plan", [str(p) for p in plans])).write_parquet(out / f"timing-{name}-plans.parquet")
    record(f"timing-{name}", {
        **shape, "repeats": REPEATS, "base_ttft_ms": float(base_s.median() * 1e3),  # type: ignore[operator]
        "plans_by_name": {
            n: {"base_ms": r["base_ttft_s"] * 1e3, "predicted_ms": r["predicted_ttft_s"] * 1e3, "measured_ms": r["ttft_s"] * 1e3,
                "error": r["predicted_ttft_s"] / r["ttft_s"] - 1}
            for n, r in by_name
        },
        "configurations_measured": timing.height, "disturbed_pairs": int(timing["disturbed"].sum()), "figure_1": first, "plans": tested.height,
        "interaction_ms_a_pair": term * 1e3, "ttft_error_median": float(errors["predicted"].median()),  # type: ignore[arg-type]
        "ttft_error_90": float(errors["predicted"].quantile(0.9)), "additive_ttft_error_median": float(errors["additive"].median()),  # type: ignore[arg-type]
        "r2_ttft": r2(tested["ttft_s"].to_numpy(), (tested["ttft_s"] - tested["predicted_ttft_s"]).to_numpy()),
        "r2_gain": r2(measured_gain, measured_gain - predicted_gain), "r2_gain_of_a_perfect_model": r2(measured_gain, noise),
        "measurements_1b": {"by signature": ours, "by group": paper, "ratio": paper / ours},
    })  # fmt: skip


def main() -> None:
    for name in sys.argv[1:] or ["demo", "wide"]:
        if name == "wide":
            run(name, WIDE, 1, 256)
        else:
            folder = DEMO if name == "demo" else Path(name)
            run(folder.name, load_config(folder), 4, 256)


def _choices_1b(*, every: bool = False) -> Choices:
    """What is to be measured for Llama-3.2-1B in BF16 and FP8: by signature, or each group for itself."""
    frame = groups_table(partition(trace(LLAMA_1B)), 40, 256)
    formats = {"linear": ("fp8_e4m3",), "bgemm": ("fp8_e4m3",)}
    return {
        str(g if every else s): choices_of(rows, formats, "bf16")
        for (s, g), rows in frame.sort("order").group_by(["signature", "group"], maintain_order=True)
    }


if __name__ == "__main__":
    main()
