"""Do times taken in torch choose what vLLM serves fastest? `python bench/serving.py`, with `make engine` done before

A Llama of four layers of width 512 in FP32, linears in INT8 under vLLM's rules, made-up weights. For a prompt alone, and for answers of
some tokens, in one run: every configuration of every signature is timed in torch and in vLLM, then twenty random plans and those that
the program chooses by either table, whole, in both. Tells how far the predictions of vLLM's times are off, in how many pairs of plans
torch's times (predicted, or measured) name the wrong one as the faster, and what the plans chosen by torch's times gain in vLLM
against those chosen by its own. A pair counts where vLLM's own measurements tell its plans apart. Last line: JSON.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from record import record
from transformers import LlamaConfig

from mpq.method import groups_of
from mpq.program.constraints import Allowed, allowed, options_by_signature
from mpq.program.gains import gains_et, solve_table
from mpq.serving import find_environment
from mpq.spec import ConstraintSpec
from mpq.store.tables import table
from mpq.timing.answer import base_answer_s
from mpq.timing.design import complete, members, sums
from mpq.timing.in_vllm import measure_each_in_vllm, measure_ttft_in_vllm
from mpq.timing.measure import measure, measure_ttft, timing_model

BASE, FORMAT, REPEATS, PLANS, BUDGETS = "fp32", "int8", 6, 20, (0.1, 0.3, 0.6)
REQUEST: dict[str, int] = {"batch": 1, "length": 256}
OUTPUTS = (1, 64)
CONFIG = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=1024,
)
Plan = dict[str, str]


def random_plans(may: Allowed, count: int) -> list[Plan]:
    """Plans that lower one decision, two, … all that can be, drawn at random."""
    rng, free = random.Random(0), [d for d in may.decisions if FORMAT in may.formats[d[0]]]
    sizes = np.linspace(1, len(free), count).round().astype(int)
    return [
        {op: FORMAT for together in rng.sample(free, size) for op in together} for size in sizes
    ]


def losses(groups: pl.DataFrame) -> pl.DataFrame:
    """A loss for each op, spread over three orders of magnitude: real ones are, and a plan then mixes formats."""
    rng = np.random.default_rng(0)
    like = {"operand": "input", "format": FORMAT, "noise_model": "ulp", "n_samples": 1}
    rows = [
        {**like, "op": op, "loss_mse": float(10 ** rng.uniform(-3, 0)), "sensitivity": 1.0}
        for op in groups["op"]
    ]
    return table("sensitivity", rows)


def chosen(groups: pl.DataFrame, gains: pl.DataFrame, budget: float) -> Plan:
    """What the program lowers under a share of the largest loss."""
    most = gains.group_by("group").agg(pl.col("loss_mse").max())["loss_mse"].sum()
    rows, _ = solve_table(gains, budget * most)
    of = members(groups, gains)
    return {
        op: f
        for group, formats in rows.select("group", "configuration").iter_rows()
        for op, f in zip(of[group], formats, strict=True)
        if f != BASE
    }


def wrong(
    said_s: Sequence[float], gain_s: Sequence[float], half_s: Sequence[float]
) -> dict[str, float]:
    """Of the pairs of plans whose gains, ± half their intervals, are told apart: how many `said_s` puts the other way round, and
    what is lost by it in the mean (s)."""
    told = lost = count = 0.0
    for i, j in itertools.combinations(range(len(gain_s)), 2):
        apart = gain_s[i] - gain_s[j]
        if abs(apart) <= np.hypot(half_s[i], half_s[j]):
            continue
        told += 1
        if (said_s[i] - said_s[j]) * apart < 0:
            count, lost = count + 1, lost + abs(apart)
    return {
        "pairs": told,
        "wrong": count,
        "share": count / max(1.0, told),
        "lost_ms": 1e3 * lost / max(1.0, count),
    }


def error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Median |predicted / measured − 1|."""
    return float(np.median(np.abs(np.array(predicted) / np.array(measured) - 1)))


def compared(output: int) -> dict[str, Any]:
    """All of it for answers of so many tokens."""
    groups = groups_of(CONFIG, REQUEST["batch"], REQUEST["length"])
    may = allowed(groups, ConstraintSpec(), "vllm", {"linear": (FORMAT,)}, BASE)
    options = options_by_signature(groups, may)
    requests = [(s, list(dict.fromkeys(c for o in of for c in o))) for s, of in options.items()]
    how: dict[str, Any] = {"base": BASE, "repeats": REPEATS, "output": output, **REQUEST}
    config, model = CONFIG.to_dict(), timing_model(CONFIG, BASE)
    in_vllm = [row for _, row in measure_each_in_vllm(config, groups, requests, **how)]
    timings = {
        "torch": measure(model, groups, requests, **how),
        "vllm": pl.concat(in_vllm, how="diagonal_relaxed"),
    }
    costs = losses(groups)
    gains = {
        name: gains_et(groups, complete(timing, options, BASE), costs, BASE, "ulp", "pooled", may)
        for name, timing in timings.items()
    }
    plans = random_plans(may, PLANS)
    choices = [
        (budget, by, chosen(groups, gains[by], budget)) for budget in BUDGETS for by in gains
    ]
    every = plans + [plan for *_, plan in choices if plan]
    times = {
        "vllm": measure_ttft_in_vllm(config, every, **how),
        "torch": measure_ttft(model, every, groups=groups, **how),
    }
    said = {name: sums(groups, of, every, BASE) for name, of in gains.items()}
    return {
        "output": output,
        "clock": times["vllm"]["clock"][0],
        "load_average": {name: float(of["load_average"].median()) for name, of in times.items()},  # type: ignore[arg-type]
        "base_ms": {name: 1e3 * base_answer_s(of) for name, of in times.items()},
        **_told(said, times),
        **_tokens(groups, gains["vllm"], plans, times["vllm"].head(PLANS)),
        "chosen": _choices(choices, every, times["vllm"]),
        "plans": [
            {
                "lowered": len(plan),
                **{f"predicted_{name}_ms": 1e3 * said[name][i] for name in said},
                **{f"gain_{name}_ms": 1e3 * of["gain_s"][i] for name, of in times.items()},
                "half_vllm_ms": 1e3 * _half(times["vllm"])[i],
            }
            for i, plan in enumerate(plans)
        ],
    }


def _tokens(
    groups: pl.DataFrame, gains: pl.DataFrame, plans: Sequence[Plan], times: pl.DataFrame
) -> dict[str, Any]:
    """Of whole answers the errors of predicted TTFT and time per further token apart, in vLLM; nothing of prompts alone."""
    if "tpot_s" not in times.columns:
        return {}
    found: dict[str, Any] = {}
    for part in ("ttft", "tpot"):
        saved = pl.Series(sums(groups, gains, plans, BASE, f"{part}_gain"))
        predicted_s = (times[f"base_{part}_s"] - saved).to_list()
        measured_s = times[f"{part}_s"].to_list()
        found[f"{part}_error"] = error(predicted_s, measured_s)
        found[f"{part}_ms"] = {
            "base": 1e3 * float(times[f"base_{part}_s"].median()),  # type: ignore[arg-type]
            "predicted": [round(1e3 * s, 4) for s in predicted_s],
            "measured": [round(1e3 * s, 4) for s in measured_s],
        }
    return found


def _half(times: pl.DataFrame) -> list[float]:
    return ((times["gain_ci_high_s"] - times["gain_ci_low_s"]) / 2).to_list()


def _told(said: Mapping[str, list[float]], times: Mapping[str, pl.DataFrame]) -> dict[str, Any]:
    """Of the random plans: errors of vLLM's times as predicted, and how often each source of gains misleads."""
    vllm = times["vllm"].head(PLANS)
    base_s = vllm["base_ttft_s"]
    if "tpot_s" in vllm.columns:
        base_s = base_s + (vllm["output"] - 1) * vllm["base_tpot_s"]
    real = vllm["gain_s"].to_list()
    whole_s = (base_s - vllm["gain_s"]).to_list()
    predicted_s = (base_s - pl.Series(said["vllm"][:PLANS])).to_list()
    sources = {
        "torch predicted": said["torch"],
        "torch measured": times["torch"]["gain_s"].to_list(),
        "vllm predicted": said["vllm"],
    }
    found: dict[str, Any] = {
        "time_error": error(predicted_s, whole_s),
        "orders": {name: wrong(of[:PLANS], real, _half(vllm)) for name, of in sources.items()},
        "signs": {
            name: sum(a * b < 0 for a, b in zip(of[:PLANS], real, strict=True))
            for name, of in sources.items()
        },
    }
    return found


def _choices(
    choices: Sequence[tuple[float, str, Plan]], every: Sequence[Plan], times: pl.DataFrame
) -> list[dict[str, Any]]:
    """For each budget what the plans chosen by either table gain in vLLM."""
    return [
        {
            "budget": budget,
            "by": by,
            "lowered": len(plan),
            "gain_ms": 1e3 * times["gain_s"][every.index(plan)] if plan else 0.0,
            "half_ms": 1e3 * _half(times)[every.index(plan)] if plan else 0.0,
        }
        for budget, by, plan in choices
    ]


def main() -> None:
    """The command."""
    told = [compared(output) for output in OUTPUTS]
    facts = {"vllm": find_environment().version, "format": FORMAT, "base": BASE, **REQUEST}
    record("serving", {**facts, "repeats": REPEATS, "workloads": told})


if __name__ == "__main__":
    main()
