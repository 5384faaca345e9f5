"""The cache of keys and values as a decision per layer: what it gains in bytes, and when it is worth its KL."""

from __future__ import annotations

import logging

import polars as pl
import pytest
from small import MIXTURES, llama_groups, small_config

from mpq.errors import MpqError
from mpq.method import gains_of, groups_of
from mpq.program.constraints import allowed
from mpq.program.gains import gains_m
from mpq.program.memory import Requests, cached
from mpq.program.plan import Plan
from mpq.program.strategies import choose, uniform_plans
from mpq.spec import ConstraintSpec, parse_spec
from mpq.store.tables import table

FORMATS = ("int8", "fp8_kv")
GROUPS = llama_groups()  # two layers, heads of 8
LAYERS = [[f"model.layers.{i}.self_attn.{x}_matmul" for x in ("qk", "av")] for i in (0, 1)]
LONG, SHORT = Requests(64, 4096), Requests(1, 2)


def sensitivity() -> pl.DataFrame:
    """A KL of 1e-4 nats for each linear in INT8, 3e-4 and 5e-4 for the layers' caches, K and V half each."""
    rows = []
    for op, kind in GROUPS.select("op", "kind").iter_rows():
        of = {"bf16": 0.0, "int8": 1e-4}
        if kind == "bgemm":
            of = {"bf16": 0.0, "fp8_kv": (3e-4 if op in LAYERS[0] else 5e-4) / 2}
        for name, kl in of.items():
            about = {"noise_model": "actual", "n_samples": 1, "sensitivity": 0.0}
            row = {"op": op, "operand": "rhs", "format": name, "loss_mse": kl, "kl": kl}
            rows.append({**row, **about})
    return table("sensitivity", rows)


def chosen(requests: Requests, kl: float, engine: str = "vllm") -> Plan:
    """The plan of the most bytes under a bound on KL."""
    menu = {"linear": ("int8",), "bgemm": ("fp8_kv",)}
    of = allowed(GROUPS, ConstraintSpec(), engine, menu, "bf16")  # type: ignore[arg-type]
    gains = gains_m(GROUPS, sensitivity(), FORMATS, "bf16", "actual", of, requests)
    return choose("ip_m", "m", GROUPS, gains, kl=kl, mean_square_loss=1.0, base="bf16")[0]


def caches(plan: Plan) -> list[int]:
    """The layers whose cache is in FP8, both products of each alike."""
    found = [{plan.formats[op] for op in of} for of in LAYERS]
    assert all(len(of) == 1 for of in found)
    return [i for i, of in enumerate(found) if of == {"fp8_kv"}]


@pytest.mark.parametrize("engine", ["vllm", "none"])
def test_a_large_cache_is_lowered_first_and_a_tiny_one_last(engine: str) -> None:
    """Under a KL that one layer's cache takes: of 64 requests of 4096 tokens it is lowered and no linear, of one of two tokens
    linears are; under one for all, everything is."""
    large = chosen(LONG, 3.5e-4, engine)
    assert caches(large) == [0]
    # 64 × 4096 tokens × 2 heads of 8, K and V, a byte less each in one of two layers
    assert large.base_cache_bytes == 64 * 4096 * 2 * 8 * 2 * 2 * 2
    assert large.cache_bytes == large.base_cache_bytes * 3 / 4
    assert large.predicted_gain >= large.base_cache_bytes / 4
    tiny = chosen(SHORT, 3.5e-4, engine)
    assert caches(tiny) == []
    assert list(tiny.lowered.values()) == ["int8"] * 3
    assert tiny.cache_bytes == tiny.base_cache_bytes
    assert caches(chosen(SHORT, 1.0, engine)) == [0, 1]
    assert large.weight_bytes is not None
    assert Plan.from_json(large.to_json()) == large


def test_without_it_in_the_menu_nothing_changes() -> None:
    """The gains of weights alone have no rows for attention and no bytes of a cache, as in the paper."""
    gains = gains_of("m", GROUPS, sensitivity(), ["int8"], "bf16")
    assert "cache_bytes" not in gains.columns
    assert not any("matmul" in op for ops in gains["ops"] for op in ops)
    plans = uniform_plans("m", GROUPS, gains, mean_square_loss=1.0, base="bf16")
    assert all(plan.cache_bytes is None for plan, _ in plans)
    with pytest.raises(MpqError, match="fp8_kv gains bytes of the cache, which hang on how many"):
        gains_of("m", GROUPS, sensitivity(), FORMATS, "bf16")


def test_attention_takes_its_cache_alone_where_nothing_is_constrained() -> None:
    """Of memory, attention's products gain by their cache: INT8, which a menu has for linears, is no choice of theirs, and a
    layer's two products are one decision."""
    gains = gains_of("m", GROUPS, sensitivity(), FORMATS, "bf16", requests=LONG)
    products = gains.filter(pl.col("ops").list.get(0).str.contains("matmul"))
    by_layer = products.group_by("ops", maintain_order=True).agg(pl.col("configuration"))
    assert by_layer["ops"].to_list() == LAYERS
    assert by_layer["configuration"].to_list() == [[[f] * 2 for f in ("bf16", "fp8_kv")]] * 2


def test_a_sliding_window_holds_no_more_than_itself() -> None:
    """Of Gemma 2's layers the first sees 16 tokens and the second all 100; K and V in two bytes, heads of 8."""
    config = small_config("gemma2", num_key_value_heads=2, head_dim=8, sliding_window=16)
    groups = groups_of(config)
    ops = [op for op in groups["op"] if "matmul" in op]
    rows = [
        {"op": op, "operand": "rhs", "format": f, "noise_model": "actual", "loss_mse": 0.0}
        for op in groups["op"]
        for f in ("bf16", "fp8_kv")
    ]
    kept = {"n_samples": 1, "sensitivity": 0.0}
    losses = table("sensitivity", [{**row, **kept} for row in rows])
    how = {"requests": Requests(3, 100)}
    gains = gains_of("m", groups.filter(pl.col("op").is_in(ops)), losses, ["fp8_kv"], "bf16", **how)  # type: ignore[arg-type]
    gained = gains.filter(pl.col("gain") > 0)["gain"].to_list()
    assert gained == [3 * 16 * 2 * 8 * 2, 3 * 100 * 2 * 8 * 2]


def test_a_latent_stays_in_base_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """DeepSeek's attention caches a latent: its products are offered no cache, which a warning says; Llama's are, unless a layer reads another one's
    keys."""
    groups = groups_of(small_config("deepseek_v3", **MIXTURES["deepseek_v3"]))
    assert cached(groups) == frozenset()
    assert cached(GROUPS) == frozenset(LAYERS[0] + LAYERS[1])
    shared = GROUPS.filter(pl.col("op") != "model.layers.1.self_attn.k_proj")
    assert cached(shared) == frozenset()
    menu = {"linear": ("int8",), "bgemm": ("fp8_kv",)}
    with caplog.at_level(logging.WARNING, "mpq"):
        of = allowed(groups, ConstraintSpec(), "vllm", menu, "bf16")
    assert {f for op, f in of.formats.items() if "matmul" in op} == {("bf16",)}
    assert (
        "fp8_kv is not for 4 products of attention, model.layers.0.self_attn.qk_matmul"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"objectives": {"tt": {"formats": ["fp8_kv"]}}}, "fp8_kv, which gains bytes of the cache"),
        ({"noise_model": "ulp"}, "ulp knows no variance of fp8_kv"),
        ({"workload": None}, "say of which requests, as workload"),
        ({"workload": None, "timing": {"batch": 8}}, "say of which requests, as workload"),
    ],
)
def test_specs_that_cannot_be_are_refused(change: dict[str, object], why: str) -> None:
    """A cache gains no time that is measured or counted, and its noise is `actual` alone."""
    spec = {
        "model": {"path": "m", "base": "bf16"},
        "calibration": {"source": "t.txt"},
        "objectives": {"m": {"formats": ["fp8_kv"]}},
        "workload": {"prompt": 8, "output": 2, "batch": 1},
    }
    with pytest.raises(MpqError, match=why):
        parse_spec({**spec, **change})
