"""How near predictions come: `python bench/fidelity.py CHECKPOINT… [--lengths 128 512 2048] [--tokens 4096]`.

For each checkpoint and length one calibration, and plans that put a share of the ops, drawn, in one format, or all ops in
mixtures. Each is predicted, and measured on held-out text; at the middle length also on text of another kind (`--other`),
under the calibration of before. Predicted over measured, quantiles over plans: KL; KL with the scale that everything in each
format gives (anchors: measured on the same text, and left out of the count); the change of the mean loss, which KL predicts;
the loss MSE under each noise model, d + KL² of the actual errors, which has the drift as well, and the form with the signs of
weights' rounding (program/signed.py). Where formats have blocks, the actual error alone is known. All plans: fidelity.parquet beside the result.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from measured import Evaluator, Plan
from record import folder_of, record

from mpq.formats.format import NOISE_MODELS
from mpq.formats.scheme import get_scheme
from mpq.loss.sensitivity import measure
from mpq.models.blocks import Blocks
from mpq.models.checkpoint import load_config
from mpq.models.graph import trace
from mpq.models.loading import load_model
from mpq.models.partition import partition
from mpq.models.text import read_blocks
from mpq.program.anchors import Measured, fitted
from mpq.program.costs import Costs
from mpq.program.signed import SignedLoss, signed_loss
from mpq.spec import TextSpec

ROOT = Path(__file__).parent.parent
BASE = "fp32"
FORMATS = ["fp8_e4m3", "fp8_e5m2", "int8", "bf16", "nvfp4", "w4a16"]
Op = tuple[str, str]  # name, kind


def plans_of(
    ops: list[Op], formats: list[str], shares: list[float], mixtures: int, seed: int
) -> Iterator[tuple[str, float, Plan]]:
    """(format, share, plan): one for each format and share, and mixtures of all formats and base."""
    draw = random.Random(seed)
    for share in shares:
        for f in formats:
            lowered = dict(draw.sample(ops, max(1, round(share * len(ops)))))
            yield f, share, {op: taken(f, kind) for op, kind in ops if op in lowered}
    for _ in range(mixtures):
        yield (
            "mixture",
            float("nan"),
            {op: taken(draw.choice([BASE, *formats]), k) for op, k in ops},
        )


def taken(name: str, kind: str) -> str:
    """The scheme, or base for a product of attention that cannot run in it."""
    return name if kind != "bgemm" or get_scheme(name).alike else BASE


def quantiles(ratios: pl.Series) -> dict[str, float]:
    """5 %, median and 95 %, the share of plans whose prediction is within 10 and 25 %, and how many there are."""
    values = ratios.drop_nulls().to_numpy()
    values = values[np.isfinite(values)]
    if not len(values):
        return {"plans": 0}
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    within = {f"within_{100 * x:g}_%": float((np.abs(values - 1) <= x).mean()) for x in (0.1, 0.25)}
    quantile = {"5_%": float(low), "median": float(middle), "95_%": float(high)}
    return {"plans": len(values), **quantile, **within}


def predictions(costs: dict[str, Costs], signed: SignedLoss, plan: Plan) -> dict[str, float | None]:
    """KL, and the loss MSE by noise model; none of a model that knows nothing of one of the plan's formats."""
    ops, formats = list(plan), list(plan.values())
    alike = all(get_scheme(f).alike for f in formats)
    kl = costs["actual"].kl(plan)
    mse = {m: of.of(ops, formats)[0] if alike or m == "actual" else None for m, of in costs.items()}
    drift = (mse["actual"] or 0.0) + kl**2
    named = {f"predicted_mse_{m}": value for m, value in mse.items()}
    more = {"predicted_mse_with_drift": drift, "predicted_mse_signed": signed.of(plan)}
    return {"predicted_kl": kl, **named, **more}


def measured(
    checkpoint: Path, length: int, options: argparse.Namespace, seed: int
) -> list[dict[str, Any]]:
    """One calibration: its plans, predicted and measured, a row each and text."""
    model = load_model(checkpoint, BASE)
    vocabulary = model.config.vocab_size
    samples = max(1, options.tokens // length)

    def text(source: Path) -> Blocks:
        part = TextSpec(source=str(source), samples=samples, length=length)
        return read_blocks(part, checkpoint, vocabulary)

    groups = partition(trace(load_config(checkpoint)))
    ops = [(op.name, op.kind) for group in groups for op in group.ops]
    calibration = text(checkpoint / "calibration.txt")
    sensitivity, _, effects = measure(
        model, ops, calibration, formats=options.formats, base=BASE, batch=max(1, 2048 // length)
    )
    del model
    costs = {name: Costs(sensitivity, name, BASE) for name in NOISE_MODELS}
    signed = signed_loss(sensitivity, effects, BASE)
    texts = {"held-out": checkpoint / "heldout.txt"}
    if length == sorted(options.lengths)[len(options.lengths) // 2]:
        texts["other"] = options.other
    plans = list(plans_of(ops, options.formats, options.shares, options.mixtures, seed))
    rows = []
    for kind, source in texts.items():
        evaluator = Evaluator(checkpoint, text(source))
        anchors = []
        for f in options.formats:
            plan = {op: taken(f, k) for op, k in ops}
            kl = evaluator.effect(plan).kl
            anchors.append(Measured(plan, costs["actual"].kl(plan), kl, 0.0))
        scale = fitted(anchors).value
        where = {"checkpoint": checkpoint.name, "length": length, "text": kind, "scale": scale}
        for f, share, plan in plans:
            effect = {k: v for k, v in asdict(evaluator.effect(plan)).items() if k != "perplexity"}
            rows.append(
                {**where, "format": f, "share": share, **effect, **predictions(costs, signed, plan)}
            )
    return rows


def told(plans: pl.DataFrame) -> dict[str, Any]:
    """Quantiles of predicted over measured."""
    kl = plans["predicted_kl"] / plans["kl"]
    # where a plan hardly moves the loss, the mean change over a few blocks is noise
    moved = plans.filter(pl.col("kl") > 1e-3)
    mse = [c for c in plans.columns if c.startswith("predicted_mse_")]
    return {
        "kl": quantiles(kl),
        "kl_with_anchors": quantiles((kl * plans["scale"]).filter(plans["share"] != 1.0)),
        "loss_change_of_plans_with_kl_over_0.001": quantiles(
            moved["predicted_kl"] / moved["loss_change"]
        ),
        **{
            f"loss_{c.removeprefix('predicted_')}": quantiles(plans[c] / plans["loss_mse"])
            for c in mse
        },
    }


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="*", default=[ROOT / "examples" / "demo"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration, and of each text")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.3, 1.0])
    parser.add_argument("--mixtures", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--other", type=Path, default=ROOT / "docs" / "log.md")
    options = parser.parse_args(given)
    torch.manual_seed(0)
    rows = []
    for checkpoint in options.checkpoints:
        for length in options.lengths:
            rows += measured(checkpoint, length, options, seed=len(rows))
            print(checkpoint.name, length, told(pl.DataFrame(rows))["kl_with_anchors"], flush=True)
        plans = pl.DataFrame(rows)
        plans.write_parquet(folder_of() / "fidelity.parquet")
        by = ["text", "checkpoint", "length"]
        cells = {
            f"{text}, {checkpoint}, {length}": told(of)
            for (text, checkpoint, length), of in plans.group_by(by, maintain_order=True)
        }
        whole = {str(text): told(of) for (text,), of in plans.group_by("text", maintain_order=True)}
        facts = {"tokens": options.tokens, "formats": options.formats, "plans": plans.height}
        record("fidelity", {**facts, "of_all": whole, "by_checkpoint_and_length": cells})


if __name__ == "__main__":
    main()
