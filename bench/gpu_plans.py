"""How the plans of a campaign fare: part `plans` of gpu_campaign.py. Predicted and measured TTFT of every strategy under ten budgets."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from torch import nn

from mpq.program.gains import gains_et, gains_tt
from mpq.program.strategies import choose
from mpq.store.tables import table
from mpq.timing.design import anchors, interaction, neighbours, sums
from mpq.timing.measure import measure_ttft

if TYPE_CHECKING:
    from gpu_campaign import Campaign

BUDGETS = tuple(
    float(b) for b in np.geomspace(0.02, 1.0, 10)
)  # of the loss MSE of everything lowered
STRATEGIES = ("ip_et", "ip_tt", "random", "prefix")
LOSS, TAU_OF_EVERYTHING = 2.5, 0.01  # made up: nats, and the τ that everything lowered just keeps


def sensitivities(c: Campaign, groups: pl.DataFrame) -> pl.DataFrame:
    """A table of sensitivities, made up: lognormal over ops, four times as large in the last layer as in the first, the same for
    each format; everything lowered keeps TAU_OF_EVERYTHING just so."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.normal(size=groups.height)) * np.linspace(1.0, 4.0, groups.height)
    size *= (TAU_OF_EVERYTHING * LOSS) ** 2 / size.sum()
    return table(
        "sensitivity",
        [
            {
                "op": op,
                "operand": "input",
                "format": f,
                "noise_model": "ulp",
                "n_samples": 1,
                "loss_mse": s,
                "sensitivity": s,
            }
            for op, s in zip(groups.sort("order")["op"], size.tolist(), strict=True)
            for f in {f for names in c.formats.values() for f in names}
        ],
    )


def plans(c: Campaign, model: nn.Module, groups: pl.DataFrame, timed: pl.DataFrame) -> pl.DataFrame:
    """Part `plans`: predicted and measured TTFT of each strategy's plan under each budget, of everything lowered, and of base."""
    sensitivity = sensitivities(c, groups)
    measured = {
        s for s, f in timed.select("signature", "configuration").iter_rows() if set(f) == {c.base}
    }
    missing = set(groups["signature"]) - measured
    if missing:
        c.say(
            f"nothing measured of {len(missing)} signatures: no plans yet, call again with --resume"
        )
        return pl.DataFrame()
    gains = {"et": gains_et(groups, timed, sensitivity, c.base, "ulp")}
    gains["tt"] = gains_tt(groups, sensitivity, c.formats["linear"], c.base, "ulp")
    base_s, loss = float(timed["base_ttft_s"].median()), LOSS**2  # type: ignore[arg-type]
    wanted: list[tuple[str, float, dict[str, str]]] = [("all base", 0.0, {})]
    lowest = {
        op: c.formats[kind][0]
        for op, kind in groups.select("op", "kind").iter_rows()
        if c.formats.get(kind)
    }
    wanted.append(("all lowered", TAU_OF_EVERYTHING, lowest))
    for share in BUDGETS:
        for strategy in STRATEGIES:
            tau, objective = (
                TAU_OF_EVERYTHING * math.sqrt(share),
                "tt" if strategy == "ip_tt" else "et",
            )
            plan, _ = choose(
                strategy,
                objective,
                groups,
                gains[objective],
                tau=tau,
                mean_square_loss=loss,
                base=c.base,
            )
            chosen = {
                op: f if f == c.base else lowest[op]
                for op, f in plan.formats.items()
                if op in lowest
            }
            wanted.append((strategy, tau, {op: f for op, f in chosen.items() if f != c.base}))
    of_op = {
        (op, f): loss for op, f, loss in sensitivity.select("op", "format", "loss_mse").iter_rows()
    }
    run: dict[str, Any] = {
        "base": c.base,
        "batch": c.batch,
        "length": c.length,
        "compiled": c.compiled,
        "repeats": c.repeats,
        "groups": groups,
    }
    whole = anchors(groups, gains["et"], c.base)
    gained = measure_ttft(model, whole, **run)["gain_s"].to_list()
    pairs = [neighbours(groups, plan, c.base) for plan in whole]
    term = interaction(pairs, sums(groups, gains["et"], whole, c.base), gained)
    c.say(
        f"{len(whole)} whole plans gain {', '.join(f'{1e3 * g:.2f}' for g in gained)} ms of {1e3 * base_s:.1f}; interaction {1e3 * term:.3g} ms a pair of groups"
    )
    anchored = {frozenset((op, f) for op, f in plan.items() if f != c.base) for plan in whole}
    rows: list[dict[str, Any]] = []
    known: dict[frozenset[tuple[str, str]], dict[str, Any]] = {}
    slowest, frame = 0.0, pl.DataFrame()
    for strategy, tau, formats in wanted:
        key, start = frozenset(formats.items()), time.monotonic()
        if key not in known:
            if c.late(slowest):
                continue
            known[key] = measure_ttft(model, [formats], **run).row(0, named=True)
            slowest = max(slowest, time.monotonic() - start)
        got, gain = known[key], summed(groups, gains["et"], formats, c.base)
        rows.append(
            {
                "strategy": strategy,
                "tau": tau,
                "loss_mse": math.fsum(of_op[item] for item in formats.items()),
                "share_lowered": len(formats) / groups.height,
                "additive_ttft_s": got["base_ttft_s"] - gain,
                "predicted_ttft_s": got["base_ttft_s"]
                - gain
                - term * neighbours(groups, formats, c.base),
                **got,
                "formats": json.dumps(formats),
                "anchor": key in anchored,
            }
        )
        frame = pl.DataFrame(rows, infer_schema_length=None)
        frame.write_parquet(c.path("plans.parquet"))
        c.say(
            f"{strategy:12} τ {tau:.4f}: predicted {1e3 * rows[-1]['predicted_ttft_s']:8.2f} ms, measured {1e3 * got['ttft_s']:8.2f}, "
            f"base {1e3 * got['base_ttft_s']:8.2f}, {100 * rows[-1]['share_lowered']:3.0f} % lowered"
        )
    if len(rows) < len(wanted):
        c.say(
            f"out of time with {len(wanted) - len(rows)} plans unmeasured: call again with --resume --parts plans"
        )
    return frame


def summed(groups: pl.DataFrame, gains: pl.DataFrame, formats: dict[str, str], base: str) -> float:
    """The sum of the gains of a plan's groups, in seconds; NaN where one of them was not measured."""
    try:
        return sums(groups, gains, [formats], base)[0]
    except KeyError:
        return math.nan


def figure(frame: pl.DataFrame, title: str) -> Figure:
    """Predicted against measured TTFT, and what each strategy makes of a bound on the loss."""
    picture = Figure(figsize=(9, 4), layout="constrained")
    left, right = picture.subplots(1, 2)
    colors = {"ip_et": "#d55e00", "ip_tt": "#0072b2", "random": "#009e73", "prefix": "#cc79a7"}
    for (strategy,), rows in frame.group_by(["strategy"], maintain_order=True):
        color = colors.get(str(strategy), "#444444")
        left.plot(
            rows["predicted_ttft_s"] * 1e3,
            rows["ttft_s"] * 1e3,
            "o",
            color=color,
            markerfacecolor="none",
            label=strategy,
        )
        style = "o-" if strategy in colors else "s"
        right.plot(
            rows["loss_mse"],
            rows["ttft_s"] * 1e3,
            style,
            color=color,
            markerfacecolor="none",
            label=strategy,
        )
    ends = [float(frame["ttft_s"].min() * 1e3) * 0.97, float(frame["ttft_s"].max() * 1e3) * 1.03]  # type: ignore[operator]
    left.plot(ends, ends, color="#444444", linewidth=1)
    left.set(xlabel="TTFT, predicted (ms)", ylabel="TTFT, measured (ms)", title=title)
    right.set(
        xlabel="loss MSE, predicted from made-up sensitivities (nats²)",
        ylabel="TTFT, measured (ms)",
    )
    right.legend(frameon=False, fontsize=8)
    return picture


def summary(timed: pl.DataFrame | None, frame: pl.DataFrame) -> dict[str, Any]:
    """The errors of predicted TTFT over the plans whose groups were all measured and that the interaction term does not rest on,
    R² of their gains, and by strategy the best TTFT."""
    found: dict[str, Any] = (
        {}
        if timed is None
        else {
            "configurations_measured": timed.height,
            "base_ttft_ms": 1e3 * float(timed["base_ttft_s"].median()),  # type: ignore[arg-type]
            "disturbed_pairs": int(timed["disturbed"].sum()),
        }
    )
    if frame.is_empty():
        return found
    some = frame.filter(
        pl.col("predicted_ttft_s").is_finite(), pl.col("share_lowered") > 0, ~pl.col("anchor")
    ).unique("formats")
    errors = {
        n: (some[f"{n}_ttft_s"] / some["ttft_s"] - 1).abs() for n in ("additive", "predicted")
    }
    gain, guess = (
        some["gain_s"].to_numpy(),
        (some["base_ttft_s"] - some["predicted_ttft_s"]).to_numpy(),
    )
    spread = ((gain - gain.mean()) ** 2).sum()
    return found | {
        "plans": frame.height,
        "distinct_plans": some.height,
        "ttft_error_median": errors["predicted"].median(),
        "ttft_error_90": errors["predicted"].quantile(0.9),
        "additive_ttft_error_median": errors["additive"].median(),
        "r2_gain": float(1 - ((gain - guess) ** 2).sum() / spread) if spread else None,
        "ttft_ms": {
            s: 1e3 * float(rows["ttft_s"].min())
            for (s,), rows in frame.group_by(["strategy"], maintain_order=True)
        },  # type: ignore[arg-type]
    }
