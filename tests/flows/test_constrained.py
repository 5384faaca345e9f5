"""A whole run under an engine's rules, a bound and a target: nothing is timed or planned that cannot be served."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from small import small_model, small_spec

from mpq.errors import MpqError
from mpq.flows.calibrate import calibrate
from mpq.report.results import results_table
from mpq.report.runs import read_run
from mpq.spec import RunSpec, parse_spec
from mpq.tasks.stage import read, read_json, read_together


def constrained(folder: Path, **more: object) -> RunSpec:
    """The small run in INT8 for vLLM."""
    data = small_spec(folder).model_dump(mode="json")
    int8 = {"formats": ["int8"], "strategies": ["ip", "uniform"]}
    return parse_spec({**data, "objectives": {"et": int8}, "engine": "vllm", **more})


def test_a_run_for_an_engine(tmp_path: Path) -> None:
    """Nine configurations are timed, for answers of five tokens; q, k, v are alike in every plan; the target's plan has its bits."""
    spec = constrained(
        tmp_path,
        workload={"prompt": 16, "output": 5, "batch": 2},
        constraints={"pin": {"model.layers.0.*.down_proj": "base"}},
        target={"effective_bits": 26},
    )
    result = calibrate(spec)
    timing = [read(ref) for ref in result["tables"]["timing"]]
    assert sum(part.height for part in timing) == 9
    plans = [plan for ref in result["plan_files"] for plan in read_json(ref)]
    assert {p["strategy"] for p in plans} == {"ip_et", "ip_loss", "uniform_int8"}
    for plan in plans:
        assert plan["engine"] == "vllm"
        for layer in range(2):
            taken = {plan["formats"][f"model.layers.{layer}.self_attn.{x}_proj"] for x in "qkv"}
            assert len(taken) == 1
        assert plan["formats"]["lm_head"] == "fp32"
        assert plan["formats"]["model.layers.0.mlp.down_proj"] == "fp32"
    (target,) = (p for p in plans if p["strategy"] == "ip_loss")
    assert 18 < target["effective_bits"] <= 26
    priced = {row["constraint"] for row in target["provenance"]["prices"]}
    assert priced >= {"vllm: tie q k v", "vllm: the head in base"}
    assert not any("experts" in name for name in priced)
    for plan in plans:
        for row in plan["provenance"].get("prices", ()):
            aim = "loss_mse" if plan["strategy"] == "ip_loss" else "gain"
            sign = -1 if aim == "loss_mse" else 1
            assert sign * row[f"{aim}_without"] >= sign * row[aim] - 1e-12
    assert set(read(result["tables"]["prices"][0])["strategy"]) == {"ip_et", "ip_loss"}
    solutions = read(result["tables"]["solutions"][0])
    assert set(solutions["effective_bits"]) == {p["effective_bits"] for p in plans}
    tokens = pl.concat(timing)
    parts = tokens["ttft_gain_s"] + 4 * tokens["tpot_gain_s"]
    np.testing.assert_allclose(tokens["gain_s"], parts, atol=1e-12)
    for plan in plans:  # base's time less the gain, but for what neighbours gain together
        assert (plan["output"], plan["base_tpot_s"]) == (5, tokens["base_tpot_s"].median())
        assert 0 < plan["predicted_tpot_s"] < 10 * plan["base_tpot_s"]
    measured = results_table({k: read_together(refs) for k, refs in result["tables"].items()})
    assert (measured["measured_tpot_s"] > 0).all()
    report = Path(result["out"]["report"])
    assert "Each further token (ms)" in report.read_text()
    # held against their contract where they are read again, prices and the target's plan too
    assert read_run(report.parent)[1]["prices"].height == len(read(result["tables"]["prices"][0]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"constraints": {"pin": {"*.dwn_proj": "base"}}}, "did you mean"),
        ({"constraints": {"bounds": {"effective_bits": 3}}}, "No plan keeps effective_bits ≤ 3"),
        ({"objectives": {"m": {"formats": ["bf16"]}}}, "vllm cannot run bf16 beside the base"),
    ],
)
def test_what_no_plan_keeps_is_told_first(tmp_path: Path, more: dict, message: str) -> None:
    """A pattern that matches nothing, a bound below all, a format that the engine lacks: before any measurement."""
    with pytest.raises(MpqError, match=message):
        calibrate(constrained(tmp_path, **more))
    kinds = (
        {path.name for path in (tmp_path / "store").iterdir()}
        if "objectives" not in more
        else set()
    )
    assert not kinds & {"sensitivity", "timing", "measurement"}


def test_without_the_engine_its_times_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run by vLLM's times where no vLLM is installed says how to install it, before anything is computed."""
    monkeypatch.setenv("MPQ_ENGINE", str(tmp_path / "nowhere"))
    spec = constrained(tmp_path)
    timing = spec.timing.model_copy(update={"engine": "vllm"})
    with pytest.raises(MpqError, match=r"no vLLM here .*make engine"):
        calibrate(spec.model_copy(update={"timing": timing}))
    assert not (tmp_path / "store" / "sensitivity").exists()


def test_a_run_decides_the_cache_layer_by_layer(tmp_path: Path) -> None:
    """Where it holds most bytes it is lowered, K and V of a layer together; what it takes is told apart from the weights."""
    spec = constrained(
        tmp_path,
        timing={"length": 1000, "output": 24, "batch": 8},
        objectives={"m": {"formats": ["int8", "fp8_kv"], "strategies": ["ip"]}},
        taus=[0.001, 1.0],
    )
    result = calibrate(spec)
    plans = [plan for ref in result["plan_files"] for plan in read_json(ref)]
    loose = max(plans, key=lambda plan: plan["tau"])
    products = [op for op in loose["formats"] if op.endswith("_matmul")]
    assert len(products) == 4
    assert {loose["formats"][op] for op in products} == {"fp8_kv"}
    # 8 × 1024 tokens, two layers, K and V of two heads of 8, in FP32 and in a byte
    assert loose["base_cache_bytes"] == 8 * 1024 * 2 * 2 * 2 * 8 * 4 == 4 * loose["cache_bytes"]
    for plan in plans:
        taken = [plan["formats"][op] for op in products]
        assert taken[::2] == taken[1::2]
    tables = {kind: read_together(refs) for kind, refs in result["tables"].items() if refs}
    row = results_table(tables).filter(tau=1.0)
    assert row["cache_bytes"][0] == loose["cache_bytes"]
    assert row["weight_bytes"][0] == loose["weight_bytes"]
    assert "KV cache (MB)" in Path(result["out"]["report"]).read_text()


@pytest.mark.parametrize("engine", ["vllm", "none"])
def test_a_cache_that_no_export_has_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """An OPT's plans of memory are refused for vLLM before any measurement; of no engine they are mpq's own, which is said once."""
    told, source = list[str](), tmp_path / "opt"
    small_model("opt", word_embed_proj_dim=32, ffn_dim=64).save_pretrained(source)
    spec = constrained(
        tmp_path,
        timing={"length": 16, "output": 4, "batch": 8},
        objectives={"m": {"formats": ["int8", "fp8_kv"], "strategies": ["ip"]}},
        engine=engine,
    )
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"path": str(source)})})
    monkeypatch.setattr("mpq.flows.exporting.announce", told.append)

    def measured(*_: object) -> None:
        raise MpqError("the work began")

    monkeypatch.setattr("mpq.flows.calibrate.sensitivity", measured)
    why = r"config.json does not say num_key_value_heads .*vLLM itself does not ask"
    with pytest.raises(MpqError, match=why if engine == "vllm" else "the work began"):
        calibrate(spec)
    assert len(told) == (engine == "none")
    assert all(
        re.fullmatch(rf"Plans with lowered caches run in mpq only\. .*{why}.*", t) for t in told
    )
