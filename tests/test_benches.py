"""Benches of the time model on a model so small that its times say nothing: what they write, and that it follows from their tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest
from small import ROOT, small_config


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """bench/timing.py with few plans, its results in the test's folder."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import record
    import timing

    monkeypatch.setattr(record, "folder_of", lambda *_: tmp_path)
    monkeypatch.setattr(timing, "folder_of", lambda *_: tmp_path)
    for name, value in (("REPEATS", 2), ("PLANS", 4), ("LIMIT", 20)):
        monkeypatch.setattr(timing, name, value)
    yield timing
    for module in (
        "timing",
        "record",
        "campaign",
    ):  # names that other tests may mean something else by
        sys.modules.pop(module, None)


def test_results_follow_from_the_tables(bench: ModuleType, tmp_path: Path) -> None:
    """A campaign leaves tables, pictures and a summary; worked out again from the tables, the summary is the same."""
    shape = (small_config("llama", num_key_value_heads=2), 1, 16)
    bench.run("tiny", *shape)
    file = tmp_path / "timing-tiny.json"
    told = json.loads(file.read_text())
    result, plans = told["result"], pl.read_parquet(tmp_path / "timing-tiny-plans.parquet")
    assert (tmp_path / "timing-tiny-figure-1.png").exists()
    assert (tmp_path / "timing-tiny-figure-3a.png").exists()
    assert (
        result["plans"]
        == plans.filter(~pl.col("name").is_in([bench.ANCHOR, bench.FASTEST])).height
        == 1 + 4
    )
    assert (
        result["configurations_measured"]
        == pl.read_parquet(tmp_path / "timing-tiny.parquet").height
    )
    bench.again(tmp_path, "tiny", *shape)
    again = json.loads(file.read_text())
    assert again.pop("worked_out")
    assert again["result"].pop("figure_1") == pytest.approx(result.pop("figure_1"), nan_ok=True)
    assert again == told


def test_signature_against_group(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every configuration of every group and of every signature, their gains compared; a plan of either table at each budget."""
    import campaign

    monkeypatch.setattr(campaign, "folder_of", lambda *_: tmp_path)
    monkeypatch.setattr(campaign, "SLIM", small_config("llama", num_key_value_heads=2))
    monkeypatch.setattr(campaign, "REPEATS", 2)
    monkeypatch.setitem(campaign.SHAPE, "length", 16)
    campaign.main()
    result = json.loads((tmp_path / "campaign.json").read_text())["result"]
    assert result["measurements"] == {"by signature": 42, "by group": 42 + 32 + 2 + 4 + 2}
    assert len(result["plans"]) == 2 * len(campaign.BUDGETS)
    assert result["gains"]["gains"] == 2 * (31 + 1 + 3 + 1) + 1


def test_pairs_put_the_wrong_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four plans, two of which vLLM does not tell apart, times that rank the best one last are wrong in three of five pairs."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import serving

    try:
        found = serving.wrong([1.0, 2.0, 3.0, 0.0], [1.0, 1.1, 3.0, 9.0], [0.1] * 4)
    finally:
        for module in ("serving", "record"):
            sys.modules.pop(module, None)
    assert (found["pairs"], found["wrong"], found["share"]) == (5, 3, 0.6)
    assert found["lost_ms"] == pytest.approx(1e3 * (8 + 7.9 + 6) / 3)
