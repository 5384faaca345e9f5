"""The loss MSE with rounding's signs: against its definition, and against what rounding really
does to a model."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from small import small_model

from mpq.errors import MpqError
from mpq.loss import measure
from mpq.models.blocks import Blocks
from mpq.program.costs import Costs
from mpq.program.signed import SignedLoss, signed_loss
from mpq.running.apply import Mixed
from mpq.store.tables import table

BASE, SAMPLES = "fp32", 4
OPS = [f"model.layers.{i}.mlp.{p}" for i in (0, 1) for p in ("gate_proj", "up_proj", "down_proj")]


def tables(seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """A sensitivity and an effects table of drawn numbers: two linears and a product of
    attention, two formats."""
    rng, rows, effects = np.random.default_rng(seed), [], []
    for op, operands in {"a": "input weight", "b": "input weight", "qk": "lhs rhs"}.items():
        for f in ("int8", "fp8_e4m3"):
            rows += [
                {
                    "op": op,
                    "operand": operand,
                    "format": f,
                    "noise_model": model,
                    "n_samples": SAMPLES,
                    **dict.fromkeys(("loss_mse", "loss_mse_stderr"), rng.uniform()),
                    "kl": rng.uniform() if model == "actual" else None,
                }
                for operand in operands.split()
                for model in ("ulp", "actual")
            ]
            if op != "qk":
                effects += [
                    {"sample": i, "op": op, "format": f, "effect": rng.normal()}
                    for i in range(SAMPLES)
                ]
    shuffled = [effects[i] for i in rng.permutation(len(effects))]
    return table("sensitivity", rows), table("effects", shuffled)


def test_is_its_definition() -> None:
    """(1/N) Σ_i (Σ_l a_il + D)² + Σ d of the operands that are no weights, each term picked from
    the tables by hand; its standard error is that of the squares over samples, and the
    activations' own."""
    sensitivity, effects = tables(1)
    # one that ran not through b
    effects = effects.filter((pl.col("op") != "b") | (pl.col("sample") != 1))
    plan = {"a": "int8", "b": "fp8_e4m3", "qk": "int8", "c": BASE}
    rows = [r for r in sensitivity.iter_rows(named=True) if plan[r["op"]] == r["format"]]
    rows = [r for r in rows if r["noise_model"] == "actual"]
    drift = sum(r["kl"] for r in rows)
    others = sum(r["loss_mse"] for r in rows if r["operand"] != "weight")
    moved = np.full(SAMPLES, drift)
    for r in effects.iter_rows(named=True):
        moved[r["sample"]] += r["effect"] * (plan[r["op"]] == r["format"])
    of = signed_loss(sensitivity, effects, BASE)
    assert of.of(plan) == pytest.approx(np.mean(moved**2) + others)
    error = np.std(moved**2, ddof=1) / np.sqrt(SAMPLES) + others  # the errors drawn are the values
    assert of.terms([plan]).error(np.array([0])) == pytest.approx(error)
    assert of.of(dict.fromkeys(plan, BASE)) == 0


def test_what_was_not_measured_is_told() -> None:
    """A format without sensitivity, and a weight without effects, are no zeros."""
    sensitivity, effects = tables(2)
    with pytest.raises(MpqError, match="sensitivity table has nothing of a in bf16"):
        signed_loss(sensitivity, effects, BASE).of({"a": "bf16"})
    with pytest.raises(MpqError, match="effects table has nothing of a in int8"):
        signed_loss(sensitivity, effects.filter(pl.col("op") != "a"), BASE).of({"a": "int8"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (pl.col("sample") + 1, "not of the 4 samples"),
        (pl.col("sample") - 1, "not of the 4 samples"),
        (pl.lit(None, pl.Int64), "not of the 4 samples"),
        (pl.col("sample").replace(2, 3), "has a sample of an op twice"),
    ],
)
def test_effects_of_other_samples_are_refused(change: pl.Expr, told: str) -> None:
    """Effects that are numbered otherwise than the samples whose sensitivity stands beside them belong to another measurement."""
    sensitivity, effects = tables(3)
    with pytest.raises(MpqError, match=told):
        signed_loss(sensitivity, effects.with_columns(sample=change), BASE)


def measured(plan: dict[str, str], blocks: Blocks) -> tuple[float, SignedLoss, Costs]:
    """The mean square change of the samples' losses when the plan runs, and what is predicted on
    the same samples."""
    model = small_model("llama", num_key_value_heads=2, intermediate_size=64)
    model.lm_head.weight.mul_(20)  # predictions that are sure of something, as a trained model's
    ops = [(op, "linear") for op in OPS]
    how = {"formats": sorted(set(plan.values())), "base": BASE}
    sensitivity, _, effects = measure(model, ops, blocks, **how)
    costs = Costs(sensitivity, "actual", BASE)
    ids = torch.from_numpy(blocks.tokens)

    def losses() -> torch.Tensor:
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].transpose(1, 2).double()
        return F.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)

    before = losses()
    mixed = Mixed(model, base=BASE, backend="emulated")
    mixed.set(plan)
    mse = float((losses() - before).square().mean())
    return mse, signed_loss(sensitivity, effects, BASE), costs


@pytest.mark.parametrize("name", ["w8a16", "int8"])
def test_is_nearer_than_a_sum_over_operands(name: str) -> None:
    """Where weights are rounded, and where activations are too, the loss of real text moves as
    predicted with signs: within a tenth, and nearer than the sum over operands comes."""
    blocks = Blocks(np.random.default_rng(3).integers(0, 97, (96, 24)))
    plan = dict.fromkeys(OPS, name)
    mse, signed, costs = measured(plan, blocks)
    ours, sums = signed.of(plan) / mse, costs.of(list(plan), list(plan.values()))[0] / mse
    assert ours == pytest.approx(1, abs=0.1)
    assert abs(np.log(ours)) < abs(np.log(sums))
