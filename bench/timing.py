"""Is the time model right? Gains of groups against sums of their ops', TTFT of whole plans predicted and measured, and the cost.

    python bench/timing.py [demo | wide | checkpoint folder …]
    python bench/timing.py --again bench/results/<device> [demo | wide …]

The second measures nothing: it works out results and pictures of an earlier campaign from its tables, after a change to the time model.
On this machine's CPU, base FP32 with BF16 and INT8 native, for two shapes with random weights: the demo's, and a Llama of width 1024
whose products take longer than what is around them. Plans: random ones of every share of lowered ops, the fastest by the gains, and
the fastest up to the middle of the model. Writes timing-<shape>.json, tables and two pictures beside the other results of this
device; each shape's last line is JSON. Sections and figure numbers are those of arXiv 2505.13060.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import math
import random
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from record import RESULTS, folder_of, record
from transformers import LlamaConfig

from mpq.formats.format import get_format
from mpq.kernels import Kind, native_formats
from mpq.models.checkpoint import load_config
from mpq.models.graph import trace
from mpq.models.partition import groups_table, partition
from mpq.program.gains import gains_et
from mpq.store.tables import table
from mpq.timing.design import (
    anchors,
    choices_of,
    complete,
    design,
    interaction,
    neighbours,
    standard_errors,
    sums,
)
from mpq.timing.gain_model import GainModel
from mpq.timing.measure import measure, measure_ttft, timing_model

BASE = "fp32"
KINDS: tuple[Kind, ...] = ("linear", "bgemm")
FORMATS = {
    kind: tuple(f for f in ("bf16", "int8") if f in native_formats("cpu", kind)) for kind in KINDS
}
REPEATS, LIMIT, PLANS = 9, 64, 24
ANCHOR, FASTEST, HALF = "anchor", "the fastest", "the fastest, first half"
DEMO = Path(__file__).parent.parent / "examples" / "demo"
WIDE = LlamaConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=4,
)
Choices: TypeAlias = dict[str, list[tuple[str, ...]]]
LLAMA_1B = LlamaConfig(  # Llama-3.2-1B's published config.json
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)


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
    ops = groups.filter(
        pl.col("signature") == signature, pl.col("group") == pl.col("group").min().over("signature")
    ).sort("order")
    gains = {tuple(r["configuration"]): r["gain_s"] for r in rows.iter_rows(named=True)}
    base = (BASE,) * ops.height
    single = {
        (i, c[i]): g
        for c, g in gains.items()
        for i in range(len(c))
        if sum(f != BASE for f in c) == 1 and c[i] != BASE
    }
    time_of = {f: get_format(f).mac_time for f in {f for c in gains for f in c}}
    many = [c for c in gains if c != base]
    y = np.array([gains[c] for c in many]) * 1e3
    sums = np.array([sum(single[i, f] for i, f in enumerate(c) if f != BASE) for c in many]) * 1e3
    macs = np.array(
        [
            sum((time_of[BASE] - time_of[f]) * m for f, m in zip(c, ops["macs"], strict=True))
            for c in many
        ]
    )
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    found: dict[str, Any] = {"signature": signature, "configurations": len(many)}
    for axes, x, name in zip(
        figure.subplots(1, 2),
        (sums, macs),
        ("sum of per-op gains (ms)", "gain by MACs"),
        strict=True,
    ):
        fitted, r2 = fit(x, y)
        axes.plot(x, y, "o", color="#0072b2", markerfacecolor="none", label="measured")
        axes.plot(
            x[np.argsort(x)],
            fitted[np.argsort(x)],
            color="#d55e00",
            label=f"least squares, R² = {r2:.3f}",
        )
        axes.set_xlabel(name)
        axes.set_ylabel("measured gain of the group (ms)")
        axes.legend(frameon=False)
        found[f"r2 of {name}"] = r2
    slope = float(np.sum(sums * y) / np.sum(sums**2))
    return figure, found | {"measured gain over sum of per-op gains": slope}


def random_plan(groups: pl.DataFrame, share: float, rng: random.Random) -> dict[str, str]:
    """Each op lowered with probability `share`, to a format of its kind."""
    return {
        op: rng.choice(FORMATS[kind])
        for op, kind in groups.select("op", "kind").iter_rows()
        if rng.random() < share
    }


def half(plan: dict[str, str], groups: pl.DataFrame) -> dict[str, str]:
    """The plan up to the middle of the model, base after it."""
    first = groups.sort("order").head(groups.height // 2)["op"]
    return {op: plan[op] for op in first if op in plan}


def figure_3a(measured_s: np.ndarray, predicted_s: np.ndarray) -> Figure:
    """TTFT of whole plans, measured against predicted."""
    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        predicted_s * 1e3,
        measured_s * 1e3,
        "o",
        color="#0072b2",
        markerfacecolor="none",
        label="plans",
    )
    ends = [measured_s.min() * 950, measured_s.max() * 1050]
    axes.plot(ends, ends, color="#444", linewidth=1, label="equal")
    axes.set_xlabel("TTFT, predicted (ms)")
    axes.set_ylabel("TTFT, measured (ms)")
    axes.legend(frameon=False)
    return figure


def run(name: str, config: Any, batch: int, length: int) -> None:
    """Measure one shape and record it."""
    groups = groups_table(partition(trace(config)), batch, length)
    choices: Choices = {}
    for (signature, _), rows in groups.sort("order").group_by(
        ["signature", "group"], maintain_order=True
    ):
        choices.setdefault(str(signature), choices_of(rows, FORMATS, BASE))
    model = timing_model(config, BASE)
    shape: dict[str, Any] = {"base": BASE, "batch": batch, "length": length}
    requests = [(s, design(c, LIMIT)) for s, c in choices.items()]
    timing = measure(
        model, groups, requests, repeats=REPEATS, target=0.01, cap=2 * REPEATS, **shape
    )
    rng = random.Random(0)
    whole = anchors(groups, coefficients(groups, complete(timing, choices, BASE)), BASE)
    named = {FASTEST: whole[0], HALF: half(whole[0], groups)}
    plans = [
        *whole,
        *named.values(),
        *(random_plan(groups, (i + 1) / PLANS, rng) for i in range(PLANS)),
    ]
    names = [*[ANCHOR] * len(whole), *named, *["random"] * PLANS]
    seconds = measure_ttft(
        model, plans, groups=groups, repeats=REPEATS + 2, target=0.005, cap=3 * REPEATS, **shape
    )
    tested = seconds.with_columns(
        pl.Series("plan", [str(p) for p in plans]), pl.Series("name", names)
    )
    out = folder_of()
    timing.write_parquet(out / f"timing-{name}.parquet")
    tested.write_parquet(out / f"timing-{name}-plans.parquet")
    record(
        f"timing-{name}",
        {**shape, "repeats": REPEATS, **worked_out(name, groups, timing, tested, out)},
    )


def again(folder: Path, name: str, config: Any, batch: int, length: int) -> None:
    """Work out the results of an earlier campaign from its tables; what it was measured on and when stays."""
    timing, tested = (
        pl.read_parquet(folder / f"timing-{name}{part}.parquet") for part in ("", "-plans")
    )
    if (
        "name" not in tested.columns
    ):  # campaigns before 2026-11-25 did not write it: plans come in this order
        anchored = tested.height - 2 - PLANS
        tested = tested.with_columns(
            pl.Series("name", [*[ANCHOR] * anchored, FASTEST, HALF, *["random"] * PLANS])
        )
    groups = groups_table(partition(trace(config)), batch, length)
    file = folder / f"timing-{name}.json"
    told = json.loads(file.read_text())
    kept = {k: v for k, v in told["result"].items() if k in ("base", "batch", "length", "repeats")}
    told["result"] = kept | worked_out(name, groups, timing, tested, folder)
    file.write_text(
        json.dumps(told | {"worked_out": datetime.date.today().isoformat()}, indent=1) + "\n",
        encoding="utf-8",
    )
    print(json.dumps(told))


def coefficients(groups: pl.DataFrame, timing: pl.DataFrame, bound: str = "pooled") -> pl.DataFrame:
    """The gains table of a completed timing table, whatever it does to the loss."""
    named = sorted({f for c in timing["configuration"] for f in c})
    no_loss = table(
        "sensitivity",
        [
            {
                "op": op,
                "operand": "input",
                "format": f,
                "noise_model": "ulp",
                "n_samples": 1,
                "loss_mse": 0.0,
                "sensitivity": 0.0,
            }
            for op in groups["op"]
            for f in named
        ],
    )
    return gains_et(groups, timing, no_loss, BASE, "ulp", bound)


def worked_out(
    name: str, groups: pl.DataFrame, timing: pl.DataFrame, plans: pl.DataFrame, out: Path
) -> dict[str, Any]:
    """How well gains measured group by group foretell whole plans: pooled (gain_model.py), and as measured (names that end in `_mean`).

    Plans that anchor the interaction term are left out, and so is the fastest, one of them measured again.
    """
    choices: Choices = {}
    for (signature,), rows in timing.group_by(["signature"], maintain_order=True):
        columns = zip(*rows["configuration"], strict=True)
        choices[str(signature)] = [
            tuple(sorted(set(c), key=lambda f: (f != BASE, f))) for c in columns
        ]
    whole, formats = complete(timing, choices, BASE), [ast.literal_eval(p) for p in plans["plan"]]
    pairs = np.array([neighbours(groups, plan, BASE) for plan in formats])
    anchored = (plans["name"] == ANCHOR).to_numpy()
    held_out = ~anchored & (plans["name"] != FASTEST).to_numpy()
    base_s, ttft_s, gain_s = (plans[c].to_numpy() for c in ("base_ttft_s", "ttft_s", "gain_s"))
    found: dict[str, Any] = {}
    predicted: dict[str, np.ndarray] = {}
    for bound in ("pooled", "mean"):
        total = np.array(sums(groups, coefficients(groups, whole, bound), formats, BASE))
        term = interaction(
            pairs[anchored].tolist(), total[anchored].tolist(), gain_s[anchored].tolist()
        )
        for kind, gains in (("additive", total), ("predicted", total + term * pairs)):
            key = kind if bound == "pooled" else f"{kind}_{bound}"
            predicted[key], error = gains, np.abs((base_s - gains) / ttft_s - 1)[held_out]
            found |= {
                f"{key}_error_median": float(np.median(error)),
                f"{key}_error_90": float(np.quantile(error, 0.9)),
                f"{key}_r2_ttft": r2(ttft_s[held_out], (ttft_s - base_s + gains)[held_out]),
                f"{key}_r2_gain": r2(gain_s[held_out], (gain_s - gains)[held_out]),
            }
        found[
            "interaction_ms_a_pair" if bound == "pooled" else f"interaction_ms_a_pair_{bound}"
        ] = term * 1e3
    figure, first = figure_1(timing, groups)
    figure.savefig(out / f"timing-{name}-figure-1.png", dpi=150)
    figure_3a(ttft_s[held_out], (base_s - predicted["predicted"])[held_out]).savefig(
        out / f"timing-{name}-figure-3a.png", dpi=150
    )
    ours = sum(len(design(c, 10**9)) for c in _choices_1b().values())
    paper = sum(len(design(c, 10**9)) for c in _choices_1b(every=True).values())
    return {
        "base_ttft_ms": float(np.median(base_s) * 1e3),
        "configurations_measured": timing.height,
        "disturbed_pairs": int(timing["disturbed"].sum()),
        "plans_by_name": {
            n: {
                "base_ms": base_s[i] * 1e3,
                "measured_ms": ttft_s[i] * 1e3,
                **{
                    f"{k}_ms": float((base_s - predicted[k])[i] * 1e3)
                    for k in ("predicted", "predicted_mean")
                },
            }
            for n in (FASTEST, HALF)
            for i in np.flatnonzero(plans["name"] == n)
        },
        "figure_1": first,
        "plans": int(held_out.sum()),
        **found,
        "left_out": left_out(timing, choices),
        "measurements_1b": {"by signature": ours, "by group": paper, "ratio": paper / ours},
    }


def left_out(timing: pl.DataFrame, choices: Choices) -> dict[str, Any]:
    """How far gains of the largest group are from what all other measurements of it predict, beside their own errors (ms, RMS)."""
    signature = max(choices, key=lambda s: math.prod(map(len, choices[s])))
    lowered = pl.Series([set(c) != {BASE} for c in timing["configuration"]])
    rows = timing.filter(lowered & (timing["signature"] == signature))
    errors, instances = standard_errors(rows, BASE), rows["instances"][0]
    model = GainModel.fit(
        choices[signature],
        [tuple(c) for c in rows["configuration"]],
        rows["gain_s"].to_list(),
        errors.tolist(),
    )
    off, own = (
        float(np.sqrt(np.mean(of**2))) * 1e3 * instances for of in (model.left_out(), errors)
    )
    return {
        "of": math.prod(map(len, choices[signature])),
        "measured": rows.height,
        "prediction_error_ms": off,
        "own_error_ms": own,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", default=["demo", "wide"])
    parser.add_argument(
        "--again", type=Path, metavar="FOLDER", help="results of an earlier campaign"
    )
    asked = parser.parse_args()
    for name in asked.shapes:
        folder = DEMO if name == "demo" else Path(name)
        if asked.again and not (asked.again / f"timing-{folder.name}-plans.parquet").exists():
            parser.error(
                f"{asked.again} has no campaign of {name}: expected one of {RESULTS}, and a shape that was measured there"
            )
        if name != "wide" and not (folder / "config.json").exists():
            parser.error(f"{name}: expected demo, wide or the folder of a checkpoint")
        shape = (WIDE, 1, 256) if name == "wide" else (load_config(folder), 4, 256)
        if asked.again:
            again(asked.again, folder.name, *shape)
        else:
            run(folder.name, *shape)


def _choices_1b(*, every: bool = False) -> Choices:
    """What is to be measured for Llama-3.2-1B in BF16 and FP8: by signature, or each group for itself."""
    frame = groups_table(partition(trace(LLAMA_1B)), 40, 256)
    formats = {"linear": ("fp8_e4m3",), "bgemm": ("fp8_e4m3",)}
    return {
        str(g if every else s): choices_of(rows, formats, "bf16")
        for (s, g), rows in frame.sort("order").group_by(
            ["signature", "group"], maintain_order=True
        )
    }


if __name__ == "__main__":
    main()
