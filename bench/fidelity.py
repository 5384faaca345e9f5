"""How near predictions come: `python bench/fidelity.py [--lengths 128 512] [--shares 0.1 0.4 1] [--samples 16]`.

Plans put a share of the ops, drawn, in one format, or all ops in mixtures; each is predicted from one calibration and measured
on held-out text. Predicted over measured, 5 %, median and 95 % of plans: KL, KL with the scale that everything in each format
gives (anchors), and the loss MSE under each noise model. The change of the mean loss is told beside the KL that it follows.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import polars as pl
import torch
from record import record

from mpq.evaluation.losses import divergences, losses
from mpq.formats.format import NOISE_MODELS
from mpq.formats.scheme import get_scheme
from mpq.loss.sensitivity import measure_sensitivity
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import load_config, load_model
from mpq.models.graph import trace
from mpq.models.partition import partition
from mpq.models.text import read_blocks
from mpq.program.anchors import fitted, measured_of
from mpq.program.costs import Costs
from mpq.running.apply import apply_plan
from mpq.spec import TextSpec

DEMO = Path(__file__).parent.parent / "examples" / "demo"
BASE = "fp32"


def plans_of(
    ops: list[tuple[str, str]],
    formats: list[str],
    shares: list[float],
    mixtures: int,
    seed: int = 0,
) -> list[dict[str, str]]:
    """A plan for each format and share of the (op, kind), and mixtures of all formats and base."""
    draw, plans = random.Random(seed), []
    for share in shares:
        for f in formats:
            lowered = dict(draw.sample(ops, max(1, round(share * len(ops)))))
            plans.append({op: taken(f, kind) if op in lowered else BASE for op, kind in ops})
    drawn = [
        {op: taken(draw.choice([BASE, *formats]), k) for op, k in ops} for _ in range(mixtures)
    ]
    return plans + drawn


def taken(name: str, kind: str) -> str:
    """The scheme, or base for a product of attention that cannot run in it."""
    return name if kind != "bgemm" or get_scheme(name).alike else BASE


def quantiles(ratios: list[float]) -> dict[str, float]:
    """5 %, median and 95 %, and the share of plans whose prediction is within 10 and 25 %."""
    values = np.array([r for r in ratios if np.isfinite(r)])
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    within = {f"within_{100 * x:g}_%": float((np.abs(values - 1) <= x).mean()) for x in (0.1, 0.25)}
    return {"5_%": float(low), "median": float(middle), "95_%": float(high)} | within


def measured(length: int, options: argparse.Namespace) -> dict[str, object]:
    """One length of text: predictions of all plans, and what they do on held-out text."""
    model = load_model(options.checkpoint, BASE)
    vocabulary = model.config.vocab_size

    def text(name: str) -> Blocks:
        source = str(options.checkpoint / name)
        part = TextSpec(source=source, samples=options.samples, length=length)
        return read_blocks(part, options.checkpoint, vocabulary)

    graph = partition(trace(load_config(options.checkpoint)))
    ops = [(op.name, op.kind) for group in graph for op in group.ops]
    sensitivity, _ = measure_sensitivity(
        model, ops, text("calibration.txt"), formats=options.formats, base=BASE, batch=8
    )
    alike = all(
        get_scheme(f).alike for f in options.formats
    )  # of blocks the actual error alone is known
    models = [name for name in NOISE_MODELS if alike or name == "actual"]
    costs = {name: Costs(sensitivity, name, BASE) for name in models}
    held_out = text("heldout.txt")
    base = losses(model, held_out, options.samples)
    anchors = [{op: taken(f, kind) for op, kind in ops} for f in options.formats]
    plans = plans_of(ops, options.formats, options.shares, options.mixtures)
    rows, seen = [], []
    for plan in anchors + plans:
        kls = divergences(model, plan, held_out, base=BASE, batch=options.samples)
        seen.append(measured_of(plan, costs["actual"].kl(plan), kls.tolist()))
        with apply_plan(model, plan, base=BASE, backend="emulated"):
            change = losses(model, held_out, options.samples) - base
        predicted = {
            f"mse_{name}": of.of(list(plan), list(plan.values()))[0] for name, of in costs.items()
        }
        rows.append(
            {
                "predicted_kl": seen[-1].predicted,
                "kl": seen[-1].kl,
                "loss_change": float(change.mean()),
                "mse": float(np.square(change).mean()),
                **predicted,
            }
        )
    table, scale = pl.DataFrame(rows[len(anchors) :]), fitted(seen[: len(anchors)])
    over_kl = (table["predicted_kl"] / table["kl"]).to_list()
    return {
        "length": length,
        "plans": table.height,
        "scale": scale.value,
        "kl": quantiles(over_kl),
        "kl_with_anchors": quantiles([scale.value * r for r in over_kl]),
        "loss_change_over_kl": quantiles((table["loss_change"] / table["kl"]).to_list()),
        **{
            f"loss_mse_{name}": quantiles((table[f"mse_{name}"] / table["mse"]).to_list())
            for name in models
        },
    }


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=DEMO)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.4, 1.0])
    parser.add_argument("--mixtures", type=int, default=4)
    parser.add_argument("--formats", nargs="+", default=["fp8_e4m3", "fp8_e5m2", "int8", "bf16"])
    options = parser.parse_args(given)
    torch.manual_seed(0)
    results = []
    for length in options.lengths:
        results.append(measured(length, options))
        print(results[-1], flush=True)
    facts = {"checkpoint": options.checkpoint.name, "samples": options.samples}
    record("fidelity", {**facts, "formats": options.formats, "lengths": results})


if __name__ == "__main__":
    main()
