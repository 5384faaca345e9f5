"""Constraints resolved on real architectures: few decisions, no plan that an engine refuses, mistakes named."""

from __future__ import annotations

import math
from typing import Any

import polars as pl
import pytest
from small import MIXTURES, llama_groups, small_config

from mpq.errors import MpqError
from mpq.models.graph import trace
from mpq.models.partition import groups_table, partition
from mpq.program.constraints import Allowed, allowed, broken, options_by_signature
from mpq.program.engines import ENGINES, KINDS, check_formats
from mpq.program.gains import gains_et, gains_m, gains_tt
from mpq.program.strategies import choose, uniform_plans
from mpq.spec import ConstraintSpec, EngineName
from mpq.store.tables import table
from mpq.timing.design import design

BASE, FORMATS = "bf16", ("int8", "fp8_e4m3")
GROUPS = llama_groups(2, 16)
BOTH = {"linear": FORMATS, "bgemm": FORMATS}


def resolved(
    engine: EngineName = "none", formats: Any = BOTH, leave_out: tuple[str, ...] = (), **spec: Any
) -> Allowed:
    """The constraints of the tiny Llama."""
    constraints = ConstraintSpec.model_validate(spec)
    return allowed(GROUPS, constraints, engine, formats, BASE, leave_out)


def sensitivity(groups: pl.DataFrame = GROUPS) -> pl.DataFrame:
    """Losses that differ by op over five orders of magnitude, INT8's the smallest."""
    noise = {BASE: 0.0, "int8": 1e-2, "fp8_e4m3": 1.0}
    rows = [
        {
            "op": op,
            "operand": "input",
            "format": f,
            "noise_model": "ulp",
            "n_samples": 1,
            "loss_mse": n * 10.0 ** -(3 + (7 * i) % 11 / 2),
            "sensitivity": 0.0,
        }
        for i, op in enumerate(groups["op"])
        for f, n in noise.items()
    ]
    return table("sensitivity", rows)


def timing(of: Allowed) -> pl.DataFrame:
    """A measured gain for each configuration that is allowed, fewer the more formats it mixes."""
    rows = []
    for signature, options in options_by_signature(GROUPS, of).items():
        for c in design(options, 10_000):
            gain = 1e-4 * math.sqrt(sum(f != BASE for f in c)) / len(set(c))
            rows.append(
                {
                    "signature": signature,
                    "group": 0,
                    "configuration": list(c),
                    "gain_s": gain,
                    "gain_ci_low_s": gain - 1e-6,
                    "gain_ci_high_s": gain + 1e-6,
                    "instances": 2,
                    "repeats": 3,
                    "ttft_s": 0.1,
                    "base_ttft_s": 0.1,
                    "device": "d",
                    "method": "signature",
                    "batch": 2,
                    "length": 16,
                }
            )
    return table("timing", rows)


def gains_of(objective: str, of: Allowed) -> pl.DataFrame:
    """The gains table of an objective under constraints."""
    if objective == "et":
        return gains_et(GROUPS, timing(of), sensitivity(), BASE, "ulp", allowed=of)
    made = gains_tt if objective == "tt" else gains_m
    return made(GROUPS, sensitivity(), FORMATS, BASE, "ulp", of)


def measured(of: Allowed) -> int:
    """How many configurations there are to time."""
    return sum(len(design(o, 10**6)) for o in options_by_signature(GROUPS, of).values())


def test_what_cannot_be_served_is_not_measured() -> None:
    """A Llama in base and one format: 42 configurations, for vLLM two a group and the head in base;
    attention in base and two formats 243, with q, k, v tied 27."""
    one = {"linear": ("int8",), "bgemm": ("int8",)}
    assert measured(resolved(formats=one)) == 32 + 2 + 4 + 2 + 2
    vllm = resolved("vllm", one)
    assert measured(vllm) == 2 + 2 + 2 + 2 + 1
    attention, *_ = options_by_signature(GROUPS, vllm).values()
    q = "model.layers.0.self_attn.{}".format
    assert list(attention[0]) == [("bf16",) * 5, ("int8", "int8", "int8", "bf16", "bf16")]
    assert measured(resolved(tie=[["*.q_proj", "*.k_proj", "*.v_proj"]])) == 3**3 + 3 + 3**2 + 3 + 3
    assert (q("q_proj"), q("k_proj"), q("v_proj")) in vllm.decisions
    assert vllm.formats["lm_head"] == ("bf16",)


def test_blocks_that_do_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    """Where an op's inputs are no whole blocks wide it stays out of that format, which is told; attention is not asked."""
    formats = {"linear": ("int8", "nvfp4", "w4a16"), "bgemm": ("int8",)}
    with caplog.at_level("WARNING", "mpq"):
        of = resolved(formats=formats)
    assert "w4a16 is not for 15 ops, model.layers.0.self_attn.q_proj among them" in caplog.text
    assert "no multiple of 128 wide" in caplog.text
    assert "nvfp4 is not" not in caplog.text
    assert of.formats["model.layers.0.mlp.down_proj"] == (BASE, "int8", "nvfp4")
    assert of.formats["model.layers.0.self_attn.qk_matmul"] == (BASE, "int8")


def test_layers_pinned_apart_share_a_signature() -> None:
    """With layer 0 pinned to base its groups have one configuration, and none of the others' more."""
    of = resolved(pin={"model.layers.0.*": "base", "*.down_proj": ["base", "int8"]})
    options = options_by_signature(GROUPS, of)
    down = next(o for s, o in options.items() if s.startswith("down_proj"))
    assert [list(o) for o in down] == [[("bf16",)], [("bf16",), ("int8",)]]
    gains = gains_of("et", of)
    first = gains.filter(pl.col("ops").list.first().str.starts_with("model.layers.0."))
    assert first["configuration"].explode().unique().to_list() == ["bf16"]


@pytest.mark.parametrize("objective", ["et", "tt", "m"])
@pytest.mark.parametrize("engine", ["vllm", "tensorrt-llm", "sglang", "gaudi", "transformers"])
def test_every_plan_can_be_served(objective: str, engine: EngineName) -> None:
    """Whatever the strategy and the bound, no plan breaks the engine's rules, a tie across groups or a pin away from base."""
    can = tuple(
        f for f in FORMATS if f in (ENGINES[engine].formats or FORMATS)
    )  # of those measured
    formats = {"linear": can, "bgemm": can}
    of = resolved(
        engine,
        formats,
        tie=[["*.o_proj", "*.down_proj"]],
        pin={"model.layers.1.mlp.*_proj": can[0]},
    )
    gains = gains_of(objective, of)
    how = {"mean_square_loss": 4.0, "base": BASE}
    least = gains.group_by("group").agg(pl.col("loss_mse").min())["loss_mse"].sum()
    plans = [
        choose(s, objective, GROUPS, gains, tau=tau + math.sqrt(least / 4), seed=seed, **how)[0]
        for s, seed in ((f"ip_{objective}", 0), ("prefix", 0), ("random", 0), ("random", 1))
        for tau in (1e-5, 1e-3, 3.0)
    ]
    plans += [plan for plan, _ in uniform_plans(objective, GROUPS, gains, **how)]
    linears = set(GROUPS.filter(pl.col("kind") == "linear")["op"])
    kept = of.of(linears) if objective == "m" else of
    for plan in plans:
        assert not broken(plan.formats, kept)
        assert plan.formats["model.layers.1.mlp.up_proj"] == can[0]
        assert set(plan.formats) >= linears
    assert len({tuple(p.formats.items()) for p in plans}) > 1


@pytest.mark.parametrize("strategy", ["ip_m", "prefix", "random"])
def test_a_pin_that_costs_more_than_the_bound(strategy: str) -> None:
    """Where what is pinned alone is over the budget, no strategy gives a plan."""
    gains = gains_of("m", resolved(pin={"*.down_proj": "fp8_e4m3"}))
    with pytest.raises(MpqError, match="No plan fits the budget"):
        choose(strategy, "m", GROUPS, gains, tau=1e-6, mean_square_loss=4.0, base=BASE)


def test_a_tie_adds_up() -> None:
    """Tied ops are one decision whose gain and loss are the sums of what each has alone."""
    alone, tied = (gains_of("m", resolved(tie=tie)) for tie in ([], [["*.q_proj", "*.v_proj"]]))

    def worth(gains: pl.DataFrame, op: str) -> tuple[float, float]:
        row = gains.filter(
            pl.col("ops").list.contains(op), pl.col("configuration").list.first() == "int8"
        )
        return row["gain"][0], row["loss_mse"][0]

    q, v = (f"model.layers.1.self_attn.{name}_proj" for name in "qv")
    sums = [a + b for a, b in zip(worth(alone, q), worth(alone, v), strict=True)]
    assert worth(tied, q) == worth(tied, v) == pytest.approx(sums)
    assert tied["group"].n_unique() == alone["group"].n_unique() - 2


def test_without_rules_everything_is_as_before() -> None:
    """No engine and no constraints: the gains table of every configuration, row for row."""
    free = resolved()
    assert gains_of("et", free).equals(gains_et(GROUPS, timing(free), sensitivity(), BASE, "ulp"))
    assert gains_of("tt", free).equals(gains_tt(GROUPS, sensitivity(), FORMATS, BASE, "ulp"))
    assert all(len(decision) == 1 for decision in free.decisions)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"pin": {"*.dwn_proj": "base"}}, r"no op matches \*.dwn_proj \(did you mean \*.down_proj"),
        ({"tie": [["*.q_proj", "*.key"]]}, r"no op matches \*.key"),
        ({"pin": {"*.o_proj": "fp8_e5m2"}}, r"cannot be in fp8_e5m2 .* bf16 and int8 and fp8_e4m3"),
        (
            {"pin": {"*.up_proj": "base", "model.layers.1.*": "int8"}},
            r"no format for model.layers.1.mlp.up_proj: pin \*.up_proj to base; pin model.layers.1.* to int8",
        ),
        (
            {"pin": {"*.q_proj": "base", "*.k_proj": "int8"}, "tie": [["*.q_proj", "*.k_proj"]]},
            r"q_proj to base; tie \*.q_proj \*.k_proj; pin \*.k_proj to int8",
        ),
    ],
)
def test_contradictions_are_told(spec: dict, message: str) -> None:
    """A pattern that matches nothing, a format that is not measured, rules that leave nothing: named in one sentence."""
    with pytest.raises(MpqError, match=message) as told:
        resolved(**spec)
    assert "\n" not in str(told.value)


def test_an_engine_and_a_pin_that_contradict_it() -> None:
    """vLLM's head stays in base: a pin elsewhere is told with the engine's rule, and holds without that rule."""
    pin = {"lm_head": "int8"}
    with pytest.raises(MpqError, match="vllm: the head in base; pin lm_head to int8"):
        resolved("vllm", pin=pin)
    assert resolved("vllm", pin=pin, leave_out=("vllm: the head in base",)).formats["lm_head"] == (
        "int8",
    )


def test_formats_that_an_engine_lacks() -> None:
    """What cannot be served is named with what can."""
    with pytest.raises(MpqError, match=r"vllm cannot run fp8_e5m2 .* int8 or fp8_e4m3"):
        check_formats("vllm", ("int8", "fp8_e5m2"))
    check_formats("none", ("fp8_e5m2",))


def test_a_broken_plan_is_told() -> None:
    """k in another format than q and v is what vLLM answers wrongly: it is named, and so is what may not be at all."""
    of = resolved("vllm")
    plan = {"model.layers.0.self_attn.q_proj": "int8", "lm_head": "int8"}
    told = broken(plan, of)
    assert len(told) == 2
    assert "k_proj in bf16" in told[0]
    assert told[1] == "lm_head may not be in int8, but in bf16"


def test_an_engine_takes_one_format_for_all_experts_of_a_layer() -> None:
    """vLLM's rule ties a layer's two expert tensors, and no shared expert to them; without an engine they are two decisions."""
    groups = groups_table(
        partition(trace(small_config("deepseek_v3", **MIXTURES["deepseek_v3"]))), 1, 8
    )
    experts = [f"model.layers.1.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")]
    formats = dict.fromkeys(KINDS, FORMATS)
    for engine, wanted in (("vllm", [tuple(experts)]), ("none", [(op,) for op in experts])):
        found = allowed(groups, ConstraintSpec(), engine, formats, BASE)
        assert [d for d in found.decisions if set(d) & set(experts)] == wanted
        assert found.formats[experts[0]] == (BASE, *FORMATS)
    assert "model.layers.1.mlp.gate" not in found.formats
    every = dict.fromkeys(KINDS, (*FORMATS, "w4a16"))
    assert allowed(groups, ConstraintSpec(), "vllm", every, BASE).formats[experts[0]] == (
        BASE,
        *FORMATS,
    )
    saved = gains_m(groups, sensitivity(groups), FORMATS, BASE, "ulp", found)
    row = saved.filter(pl.col("ops") == [experts[1]], pl.col("configuration") == ["int8"])
    width = groups.filter(pl.col("op") == experts[1])["in_features"].item()
    # a byte a weight of four experts, less a scale an output channel of each
    assert row["gain"].to_list() == [4 * 24 * 32 * (1 - 4 / width)]
