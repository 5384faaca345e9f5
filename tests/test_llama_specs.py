"""The specs for the paper's two models, checked without weights or a GPU: partition and program from the published configurations."""

from __future__ import annotations

from functools import cache

import polars as pl
import pytest
from small import ROOT

from mpq.models.checkpoint import load_config
from mpq.models.graph import trace
from mpq.models.partition import groups_table, partition
from mpq.program.gains import gains_et, gains_m, gains_tt
from mpq.program.strategies import choose
from mpq.spec import RunSpec, load_spec, plans_at_most
from mpq.store.tables import table
from mpq.timing.design import choices_of, design

# layers, rows of the prefill, parameters of all linears (the head among them)
MODELS = {"llama-3.2-1b": (16, 40, 1_235_746_816), "llama-3.1-8b": (32, 10, 7_504_658_432)}
LAYER = [32, 2, 4, 2]  # configurations: q, k, v, qk, av; o; gate, up; down; in two formats each


@cache
def spec_of(name: str) -> RunSpec:
    return load_spec(ROOT / "examples" / f"{name}.yaml")


@cache
def groups_of(name: str) -> pl.DataFrame:
    timing = spec_of(name).timing
    return groups_table(
        partition(trace(load_config(ROOT / "examples" / name))), timing.batch, timing.length
    )


def configurations(name: str, group: pl.DataFrame) -> list[tuple[str, ...]]:
    """What is timed of one group at first: with this few, every configuration."""
    return design(
        choices_of(group, {kind: ["fp8_e4m3"] for kind in ("linear", "bgemm")}, "bf16"),
        spec_of(name).timing.limit,
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_setup(name: str) -> None:
    """BF16 against FP8-E4M3 on CUDA, the paper's batch, its four tasks, 20 % of them calibrating, each program against both baselines."""
    spec = spec_of(name)
    assert (spec.model.base, spec.model.device, spec.formats) == ("bf16", "cuda", ("fp8_e4m3",))
    assert spec.timing.batch == MODELS[name][1]
    assert (spec.calibration.source, spec.calibration.share, spec.calibration.samples) == (
        "tasks",
        0.2,
        None,
    )
    assert spec.evaluation is not None
    assert spec.evaluation.tasks == ("hellaswag", "lambada_openai", "winogrande", "piqa")
    assert spec.evaluation.task_limit is None
    assert spec.evaluation.seeds > 1
    assert set(spec.objectives) == {"et", "tt", "m"}
    assert all(
        set(part.strategies) == {"ip", "random", "prefix", "uniform"} and part.random_seeds > 1
        for part in spec.objectives.values()
    )
    assert sum(plans_at_most(spec).values()) >= 50


@pytest.mark.parametrize("name", MODELS)
def test_partition(name: str) -> None:
    """Four groups a layer and the head, five signatures, the published number of parameters, 42 configurations to time."""
    layers, _, parameters = MODELS[name]
    groups = groups_of(name)
    by_group = (
        groups.sort("order").group_by("group", maintain_order=True).agg("op", "signature", "kind")
    )
    members = [[op.rpartition(".")[2] for op in ops] for ops in by_group["op"]]
    layer = [
        ["q_proj", "k_proj", "v_proj", "qk_matmul", "av_matmul"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert [sorted(m) for m in members] == [sorted(m) for m in (layer * layers + [["lm_head"]])]
    assert groups["signature"].n_unique() == 5
    assert groups["parameters"].sum() == parameters
    counts = [
        len(configurations(name, rows)) for _, rows in groups.group_by("group", maintain_order=True)
    ]
    assert sorted(counts) == sorted(LAYER * layers + [2])
    timed = [
        rows.filter(pl.col("group") == rows["group"].min())
        for _, rows in groups.group_by("signature")
    ]
    assert sum(len(configurations(name, rows)) for rows in timed) == 42


@pytest.mark.parametrize("name", MODELS)
def test_program(name: str) -> None:
    """Variables of each program, and that it solves at every τ of the spec, with made-up losses and times."""
    layers, spec, groups = MODELS[name][0], spec_of(name), groups_of(name)
    sensitivity = table(
        "sensitivity",
        [
            {
                "op": op,
                "operand": "all",
                "format": f,
                "noise_model": spec.noise_model,
                "n_samples": 1,
                "loss_mse": loss * 1e-6 * (1 + i % 7),
                "sensitivity": 0.0,
            }
            for i, op in enumerate(groups["op"])
            for f, loss in (("bf16", 0.0), ("fp8_e4m3", 1.0))
        ],
    )
    times = []
    for (signature,), rows in groups.group_by(["signature"], maintain_order=True):
        one = rows.filter(pl.col("group") == rows["group"].min())
        for c in configurations(name, one):
            gain = 1e-4 * sum(f != "bf16" for f in c)
            times.append(
                {
                    "signature": signature,
                    "configuration": list(c),
                    "gain_s": gain,
                    "gain_ci_low_s": gain,
                    "gain_ci_high_s": gain,
                }
            )
    timing = pl.DataFrame(times)
    gains = {
        "et": gains_et(groups, timing, sensitivity, "bf16", spec.noise_model),
        "tt": gains_tt(groups, sensitivity, ["fp8_e4m3"], "bf16", spec.noise_model),
        "m": gains_m(groups, sensitivity, ["fp8_e4m3"], "bf16", spec.noise_model),
    }
    assert gains["et"].height == 40 * layers + 2
    assert gains["tt"].height == 2 * (9 * layers + 1)
    assert gains["m"].height == 2 * (7 * layers + 1)
    for objective, frame in gains.items():
        shares = []
        for tau in spec.taus:
            plan, row = choose(
                f"ip_{objective}",
                objective,
                groups,
                frame,
                tau=tau,
                mean_square_loss=6.0,
                base="bf16",
            )
            assert row["predicted_loss_mse"] <= row["budget"]
            assert (
                len(plan.formats)
                == (
                    groups.filter(pl.col("kind") == "linear") if objective == "m" else groups
                ).height
            )
            shares.append(plan.share_lowered)
        assert shares == sorted(shares)
        assert shares[0] < shares[-1]
