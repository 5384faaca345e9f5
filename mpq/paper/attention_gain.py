"""Figure 1: whether the time gain of a group can be told from its ops one at a time, or from MACs.

Each configuration of the attention group was timed as a whole. Beside it stand the sum of the
gains of its ops lowered one at a time, and the gain in MACs. MACs have another unit, and any scale
and bias of them is free, so both are fitted.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpq.formats.format import FORMATS
from mpq.report.style import BLUE, INK, RED, SMALL, dress


def attention_gains(groups: pl.DataFrame, timing: pl.DataFrame, base: str) -> pl.DataFrame:
    """A row for each timed configuration of the attention group.

    Columns: configuration, gain_s with gain_ci_low_s and gain_ci_high_s, sum_s (of its ops' own
    gains), macs (BF16 MACs gained), lowered (how many ops). The group is the one with products of
    activations that occurs most often. Configurations that lower an op which was not timed alone
    are left out; empty where no such group was timed.
    """
    empty = pl.DataFrame(
        schema=dict.fromkeys(
            ("gain_s", "gain_ci_low_s", "gain_ci_high_s", "sum_s", "macs"), pl.Float64
        )
    )
    attention = groups.filter(
        (pl.col("kind") == "bgemm").any().over("group")
        & pl.col("signature").is_in(timing["signature"].implode())
    )
    if attention.is_empty() or base not in FORMATS:
        return empty
    signature = (
        attention.group_by("signature")
        .agg(n=pl.col("group").n_unique(), first=pl.col("order").min())
        .sort("n", "first", descending=[True, False])["signature"][0]
    )
    one = attention.filter(signature=signature)
    ops = one.filter(pl.col("group") == one["group"].min()).sort("order")
    rows = timing.filter(signature=signature).unique(
        "configuration", keep="first", maintain_order=True
    )
    alone: dict[tuple[int, str], float] = {}
    for configuration, gain in rows.select("configuration", "gain_s").iter_rows():
        lowered = [i for i, f in enumerate(configuration) if f != base]
        if len(lowered) == 1:
            alone[lowered[0], configuration[lowered[0]]] = gain
    out: list[dict[str, object]] = []
    for row in rows.iter_rows(named=True):
        chosen = [(i, f) for i, f in enumerate(row["configuration"]) if f != base]
        if (
            len(chosen)
            and len(row["configuration"]) == ops.height
            and all(c in alone for c in chosen)
        ):
            macs = sum(
                (FORMATS[base].mac_time - FORMATS[f].mac_time) * ops["macs"][i] for i, f in chosen
            )
            kept = {
                c: row[c] for c in ("configuration", "gain_s", "gain_ci_low_s", "gain_ci_high_s")
            }
            out.append(
                {
                    **kept,
                    "sum_s": math.fsum(alone[c] for c in chosen),
                    "macs": float(macs),
                    "lowered": len(chosen),
                }
            )
    return pl.DataFrame(out) if out else empty


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Least-squares scale and bias of y ≈ scale·x + bias, and R² (nan where y does not vary)."""
    centred = x - x.mean()
    spread = float(centred @ centred)
    scale = float(centred @ (y - y.mean())) / spread if spread > 0 else 0.0
    bias = float(y.mean() - scale * x.mean())
    total = float(((y - y.mean()) ** 2).sum())
    return (
        scale,
        bias,
        1 - float(((y - scale * x - bias) ** 2).sum()) / total if total > 0 else math.nan,
    )


def draw_attention_gains(rows: pl.DataFrame) -> Figure:
    """Measured gain (ms, with its 95 % interval), in one panel against the sum of per-op gains
    (ms), in the other against MACs gained."""
    figure = Figure(figsize=(8.6, 3.7), layout="constrained")
    left = figure.add_subplot(1, 2, 1)
    right = figure.add_subplot(1, 2, 2, sharey=left)
    _panel(
        left,
        rows,
        rows["sum_s"] * 1e3,
        "Sum of the gains of its ops one at a time (ms)",
        BLUE,
        "ms",
    )
    _panel(
        right,
        rows,
        rows["macs"] * 1e-9,
        "MAC time gained (billion BF16 MACs)",
        RED,
        "ms per billion MACs",
    )
    right.set_ylabel("")
    bottom, top = left.get_ylim()
    left.set_ylim(bottom, top + 0.28 * (top - bottom))  # room for the legends above the marks
    return figure


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _panel(
    axes: Axes, rows: pl.DataFrame, x: pl.Series, label: str, colour: str, unit: str
) -> None:
    dress(axes)
    xs, ys = x.to_numpy(), rows["gain_s"].to_numpy() * 1e3
    low = np.maximum(ys - rows["gain_ci_low_s"].to_numpy() * 1e3, 0)
    high = np.maximum(rows["gain_ci_high_s"].to_numpy() * 1e3 - ys, 0)
    crowded = len(xs) > 60
    axes.errorbar(
        xs,
        ys,
        np.nan_to_num([low, high]),
        linestyle="none",
        marker="o",
        markersize=3 if crowded else 5,
        markerfacecolor="none",
        color=colour,
        elinewidth=0.5 if crowded else 0.8,
        label="a configuration",
    )
    scale, bias, r2 = fit(xs, ys)
    ends = np.array([min(0.0, float(xs.min())), float(xs.max()) * 1.05])
    factor = "" if unit == "ms" else " ms/10⁹"
    sign = "+" if bias >= 0 else "−"
    text = f"fit: {_number(scale)}{factor} · x {sign} {abs(bias):.2g} ms, R² = {r2:.2f}"
    axes.plot(ends, scale * ends + bias, color=INK, linewidth=1.2, label=text)
    if unit == "ms":
        axes.plot(ends, ends, color=INK, linewidth=1, linestyle=(0, (1, 2)), label="equal")
    axes.set_xlabel(label)
    axes.set_ylabel("Gain of the configuration, measured (ms)")
    axes.margins(0.06)
    axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK, loc="upper left")
