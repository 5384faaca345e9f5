"""A plausible run, made up: tables as the stages write them, whose numbers tests can compute again."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import polars as pl

from mpq.report.page import REPORTED
from mpq.store.tables import table

BASE, LOWER = "bf16", ("fp8_e4m3", "int8")
TAUS = (0.0005, 0.001, 0.002, 0.004, 0.008)
BASE_TTFT = 0.02
PARTS = (
    ("q_proj", "k_proj", "v_proj", "qk_matmul", "av_matmul"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)


def make_groups(layers: int) -> pl.DataFrame:
    rows: list[dict[str, object]] = []
    names = [
        (4 * k + j, f"model.layers.{k}.{'mlp' if j > 1 else 'self_attn'}.{op}", part)
        for k in range(layers)
        for j, part in enumerate(PARTS)
        for op in part
    ]
    for group, name, part in [*names, (4 * layers, "lm_head", ("lm_head",))]:
        kind = "bgemm" if name.endswith("matmul") else "linear"
        rows.append(
            {
                "group": group,
                "order": len(rows),
                "op": name,
                "kind": kind,
                "signature": "+".join(part) + "-0a1b2c3d",
                "in_features": 512,
                "out_features": 512,
                "macs": 8 * 256 * 512 * 512,
                "parameters": 512 * 512 if kind == "linear" else 0,
                "heads": 8,
                "kv_heads": 8,
            }
        )
    return table("groups", rows)


def make_run(layers: int = 16, seeds: int = 2) -> dict[str, pl.DataFrame]:
    """A plausible run: three objectives, five τ, three strategies each, two draws of random."""
    draw, groups, square = random.Random(1), make_groups(layers), 6.25
    ops = groups["op"].to_list()
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in REPORTED if name != "groups"}
    for op in ops:
        scale = math.exp(draw.gauss(-16, 1.5))
        for operand in ("lhs", "rhs") if op.endswith("matmul") else ("input", "weight"):
            for noise in ("paper", "ulp"):
                for f, factor in zip((BASE, *LOWER), (0.0, 1.0, 0.3), strict=True):
                    tables["sensitivity"].append(
                        {
                            "op": op,
                            "operand": operand,
                            "format": f,
                            "noise_model": noise,
                            "n_samples": 64,
                            "loss_mse": scale * factor / (1 if noise == "ulp" else 0.54),
                            "sensitivity": scale * 100,
                        }
                    )
    tables["loss"] = [{"n_samples": 64, "mean_square_loss": square, "mean_loss": 2.49}]
    for part in {
        tuple(of["op"].str.split(".").list.last())
        for _, of in groups.group_by("group", maintain_order=True)
    }:
        for f in (BASE, *LOWER):
            gain = 0.0 if f == BASE else 1e-4 * len(part)
            tables["timing"].append(
                {
                    "signature": "+".join(part) + "-0a1b2c3d",
                    "group": 0,
                    "configuration": [f] * len(part),
                    "instances": layers,
                    "repeats": 5,
                    "ttft_s": BASE_TTFT - layers * gain,
                    "base_ttft_s": BASE_TTFT,
                    "gain_s": gain,
                    "gain_ci_low_s": gain * 0.9,
                    "gain_ci_high_s": gain * 1.1,
                    "device": "cpu",
                    "method": "alias",
                    "batch": 8,
                    "length": 256,
                    "load_average": 1.0,
                    "steal_share": 0.0,
                }
            )
    for objective, scale in (("et", 0.008), ("tt", 3e9), ("m", 4e7)):
        for strategy, worth, seed in (
            (f"ip_{objective}", 1.0, 0),
            ("random", 0.55, 0),
            ("random", 0.6, 1),
            ("prefix", 0.45, 0),
        ):
            for i, tau in enumerate(TAUS):
                share = worth * (i + 1) / len(TAUS)
                gain, predicted = scale * share, tau**2 * square * draw.uniform(0.8, 1)
                who = {"strategy": strategy, "objective": objective, "tau": tau}
                tables["solutions"].append(
                    {
                        **who,
                        "seed": seed,
                        "predicted_loss_mse": predicted,
                        "budget": tau**2 * square,
                        "predicted_gain": gain,
                        "bound": gain,
                        "status": "optimal" if strategy.startswith("ip") else "heuristic",
                        "solver": "highs" if strategy.startswith("ip") else "none",
                        "seconds": 0.1,
                        "note": "",
                        "share_lowered": share,
                        "predicted_ttft_s": BASE_TTFT - gain if objective == "et" else None,
                        "base_ttft_s": BASE_TTFT if objective == "et" else None,
                    }
                )
                lowered = set(ops if share == 1 else draw.sample(ops, int(share * len(ops))))
                tables["plans"] += [
                    {
                        **who,
                        "seed": seed,
                        "op": op,
                        "format": LOWER[n % 2] if op in lowered else BASE,
                    }
                    for n, op in enumerate(ops)
                ]
                for q in range(seeds):
                    mse = predicted * draw.uniform(0.75, 1.2)
                    for metric, value, base_value in (
                        ("loss_mse", mse, square),
                        ("perplexity", 12.1 + 40 * mse, 12.06),
                        ("loss", 2.491, 2.49),
                    ):
                        tables["evaluation"].append(
                            {
                                **who,
                                "plan_seed": seed,
                                "seed": q,
                                "task": "loss",
                                "metric": metric,
                                "value": value,
                                "base_value": base_value,
                            }
                        )
                if objective == "et":
                    tables["evaluation"].append(
                        {
                            **who,
                            "plan_seed": seed,
                            "seed": 0,
                            "task": "loss",
                            "metric": "ttft_s",
                            "value": BASE_TTFT - gain * draw.uniform(0.85, 1.1),
                            "base_value": BASE_TTFT * draw.uniform(0.99, 1.01),
                        }
                    )
    return {"groups": groups, **{name: table(name, rows) for name, rows in tables.items()}}


def with_intervals(run: dict[str, pl.DataFrame], half: float = 2e-4) -> dict[str, pl.DataFrame]:
    """The run with each plan's measured gain, ± `half` seconds, as the evaluation stage writes it."""
    timed = run["evaluation"].filter(pl.col("metric") == "ttft_s")
    gain = pl.col("base_value") - pl.col("value")
    rows = [
        timed.with_columns(metric=pl.lit(metric), value=gain + off)
        for metric, off in (("gain_s", 0.0), ("gain_ci_low_s", -half), ("gain_ci_high_s", half))
    ]
    return {**run, "evaluation": pl.concat([run["evaluation"], *rows])}


UNIFORM_GAIN, UNIFORM_LOSS = 0.009, 2e-3  # s, nats²: faster than all plans, and far above bounds


def with_uniform(run: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """The run with everything in INT8, with the head and without, for measured time and memory."""
    ops, square = run["groups"]["op"].to_list(), 6.25
    tables: dict[str, list[dict[str, Any]]] = {"solutions": [], "plans": [], "evaluation": []}
    for objective, strategy, factor in (
        ("et", "uniform_int8", 1.0),
        ("et", "uniform_int8_but_head", 0.8),
        ("m", "uniform_int8", 1.0),
    ):
        loss, gain = UNIFORM_LOSS * factor, UNIFORM_GAIN * factor
        tau = math.sqrt(loss / square)
        who: dict[str, Any] = {"strategy": strategy, "objective": objective, "tau": tau}
        kept = "lm_head" if strategy.endswith("head") else ""
        tables["solutions"].append(
            {
                **who,
                "seed": 0,
                "predicted_loss_mse": loss,
                "budget": loss,
                "predicted_gain": gain if objective == "et" else 5e7,
                "bound": None,
                "status": "heuristic",
                "solver": "none",
                "seconds": 0.0,
                "note": "",
                "share_lowered": 1.0,
                "predicted_ttft_s": BASE_TTFT - gain if objective == "et" else None,
                "base_ttft_s": BASE_TTFT if objective == "et" else None,
            }
        )
        tables["plans"] += [
            {**who, "seed": 0, "op": op, "format": BASE if op == kept else "int8"} for op in ops
        ]
        measured = {"loss_mse": (loss, square), "perplexity": (12.06 * (1 + 0.05 * factor), 12.06)}
        if objective == "et":
            measured["ttft_s"] = (BASE_TTFT - gain, BASE_TTFT)
        tables["evaluation"] += [
            {
                **who,
                "plan_seed": 0,
                "seed": 0,
                "task": "loss",
                "metric": metric,
                "value": value,
                "base_value": base_value,
            }
            for metric, (value, base_value) in measured.items()
        ]
    more = {name: pl.concat([run[name], table(name, rows)]) for name, rows in tables.items()}
    return run | more


TASKS = {"hellaswag": 0.45, "lambada_openai": 0.55, "winogrande": 0.58, "piqa": 0.7}
LOSES = {"ip": 4.0, "random": 9.0, "prefix": 12.0, "uniform": 8.0}  # points at the largest τ


def add_accuracy(
    run: dict[str, pl.DataFrame], seeds: int = 4, noise: float = 0.1
) -> dict[str, pl.DataFrame]:
    """The run with accuracies of four tasks (and LAMBADA's perplexity) for each plan and seed; ip_ loses least."""
    draw, rows = random.Random(2), []
    for who in (
        run["solutions"].select("strategy", "objective", "tau", "seed").iter_rows(named=True)
    ):
        step = TAUS.index(who["tau"]) + 1 if who["tau"] in TAUS else len(TAUS)
        lost = LOSES[who["strategy"].split("_")[0]] * step / len(TAUS)
        for seed, (task, base) in itertools.product(range(seeds), TASKS.items()):
            key = {
                **{k: v for k, v in who.items() if k != "seed"},
                "plan_seed": who["seed"],
                "seed": seed,
                "task": task,
            }
            rows.append(
                {
                    **key,
                    "metric": "acc",
                    "value": base - (lost + draw.gauss(0, noise)) / 100,
                    "base_value": base,
                }
            )
            if task == "lambada_openai":
                rows.append(
                    {
                        **key,
                        "metric": "perplexity",
                        "value": 12 * (1 + lost / 100),
                        "base_value": 12.0,
                    }
                )
    return {**run, "evaluation": pl.concat([run["evaluation"], table("evaluation", rows)])}


def add_attention(run: dict[str, pl.DataFrame], together: float = 0.7) -> dict[str, pl.DataFrame]:
    """The run with every configuration of the attention group timed: `together` of the sum of its ops' gains, and noise."""
    draw, gains, rows = random.Random(3), (3e-4, 1e-4, 1e-4, 2e-4, 5e-5), []
    signature = "q_proj+k_proj+v_proj+qk_matmul+av_matmul-0a1b2c3d"
    kept = run["timing"].filter(pl.col("signature") != signature)
    for configuration in itertools.product((BASE, LOWER[0]), repeat=5):
        on = [i for i, f in enumerate(configuration) if f != BASE]
        gain = sum(gains[i] for i in on) * (together if len(on) > 1 else 1.0) + (
            draw.gauss(0, 1e-5) if len(on) > 1 else 0.0
        )
        rows.append(
            {
                **kept.row(0, named=True),
                "signature": signature,
                "configuration": list(configuration),
                "gain_s": gain,
                "gain_ci_low_s": gain - 2e-5,
                "gain_ci_high_s": gain + 2e-5,
                "ttft_s": BASE_TTFT - gain,
            }
        )
    return {**run, "timing": pl.concat([kept, table("timing", rows)])}
