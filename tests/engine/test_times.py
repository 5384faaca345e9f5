"""Times taken inside vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import small_config, small_model
from test_served import SHAPE

from mpq.errors import MpqError
from mpq.method import groups_of
from mpq.serving import EngineProcess
from mpq.timing import in_vllm
from mpq.timing.in_vllm import measure_each_in_vllm, measure_ttft_in_vllm

CONFIG = small_config("llama", **{**SHAPE, "num_hidden_layers": 2})
FACTS: dict[str, Any] = {"base": "fp32", "batch": 2, "length": 16, "repeats": 2}
OPS = [f"model.layers.{k}.self_attn.{x}_proj" for k in (0, 1) for x in "qkv"]


def config_json() -> dict[str, Any]:
    """The content of the model's config.json."""
    return {**CONFIG.to_dict(), "architectures": ["LlamaForCausalLM"]}


def test_an_exchanged_linear_is_the_mixed_engines(tmp_path: Path, engine: EngineProcess) -> None:
    """Base's engine with another's linears answers, bit for bit, as an engine of that mixture; put back, as before."""
    from small_export import plan_of

    from mpq.export.exporting import export

    source = tmp_path / "model"
    small_model("llama", **SHAPE).save_pretrained(source)
    all_linears = [f"model.layers.{k}.mlp.{x}_proj" for k in (0, 1) for x in ("gate", "up", "down")]
    tokens = np.random.default_rng(0).integers(0, 256, (2, 32)).tolist()
    export(plan_of(source, dict.fromkeys(all_linears, "fp8_e4m3")), source, tmp_path / "whole")
    export(plan_of(source, {all_linears[2]: "fp8_e4m3"}), source, tmp_path / "mixed")
    how = {"dtype": "float32", "tokens": 34, "rows": 2, "dummy": False}
    for name, folder in (
        ("base", source),
        ("whole", tmp_path / "whole"),
        ("mixed", tmp_path / "mixed"),
    ):
        engine.ask("open", name=name, folder=str(folder), **how)

    def answer(name: str, **more: object) -> list[list[float]]:
        found: list[list[float]] = engine.ask("log_probabilities", name=name, tokens=tokens, **more)
        return found

    before = answer("base")
    assert answer("base", linears={all_linears[2]: "whole"}) == answer("mixed") != before
    assert answer("base") == before
    for name in ("base", "whole", "mixed"):
        engine.ask("close", name=name)


def test_times(engine: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations and a plan in both formats are timed beside base without weights; all base gains nothing."""
    monkeypatch.setitem(in_vllm._idle, 1, engine)
    groups = groups_of(CONFIG, batch=2, length=16)
    signature = groups.filter(op="model.layers.0.mlp.down_proj")["signature"][0]
    requests = [(signature, [("fp32",), ("int8",), ("fp8_e4m3",)])]
    rows = dict(measure_each_in_vllm(config_json(), groups, requests, **FACTS))
    assert sorted(rows) == [0, 1, 2]
    assert rows[0]["gain_s"][0] == 0
    assert all(row["ttft_s"][0] > 0 and row["mode"][0] == "vllm eager" for row in rows.values())
    assert all("vLLM 0." in row["device"][0] for row in rows.values())
    frame = measure_ttft_in_vllm(config_json(), [dict.fromkeys(OPS, "int8")], **FACTS)
    assert frame["ttft_s"][0] > 0
    assert frame["gain_ci_low_s"][0] <= frame["gain_s"][0] <= frame["gain_ci_high_s"][0]


def test_compiled_times(engine: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration is timed in a compiled engine of its own beside base's, and neither stays open; the tests' own process,
    in which nothing is compiled, refuses. One layer: compiling is what takes the time."""
    config = {**config_json(), "num_hidden_layers": 1}
    folder = in_vllm._folder(config)
    how = {"dtype": "float32", "tokens": 34, "rows": 2, "dummy": True, "compiled": True}
    with pytest.raises(MpqError, match="compiles nothing here"):
        engine.ask("open", name="refused", folder=str(folder), **how)
    engine.ask("close", name="refused")
    monkeypatch.setattr(in_vllm, "_idle", {})
    shape = {**SHAPE, "num_hidden_layers": 1}
    groups = groups_of(small_config("llama", **shape), batch=2, length=16)
    signature = groups.filter(op="model.layers.0.mlp.down_proj")["signature"][0]
    ((_, row),) = measure_each_in_vllm(
        config, groups, [(signature, [("int8",)])], **FACTS, compiled=True
    )
    in_vllm._idle.pop(1).close()
    assert row["mode"].to_list() == ["vllm compiled"]
    assert row["ttft_s"][0] > 0
    assert row["base_ttft_s"][0] > 0
