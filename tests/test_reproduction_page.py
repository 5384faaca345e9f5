"""docs/reproduction.py: the page's numbers come from a run's tables, and nothing else of the page moves."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from small import ROOT
from synthetic import add_accuracy, make_run

from mpq.report.runs import write_run
from mpq.store.entries import Store


def test_the_page_is_written_from_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 1, the paper's averages, the check of additivity and every figure made stand between the markers."""
    file = ROOT / "docs" / "reproduction.py"
    module_spec = importlib.util.spec_from_file_location("reproduction", file)
    assert module_spec is not None
    assert module_spec.loader is not None
    reproduction = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(reproduction)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "reproduction.md"
    page.write_text((ROOT / "docs" / "reproduction.md").read_text())
    monkeypatch.setattr(reproduction, "DOCS", tmp_path / "docs")

    tables = add_accuracy(make_run())
    run = tmp_path / "run"
    run.mkdir()
    store = Store((tmp_path / "store").as_uri())
    references = {name: [store.write_table(name, "k", frame)] for name, frame in tables.items()}
    write_run(run, "made-up", {"model": "m", "base": "bf16"}, references)
    (run / "figures").mkdir()
    made = [f"figure_{n}.png" for n in ("2", "3a", "8", "9")]
    for name in made:
        for file in (name, name.replace("png", "svg")):
            (run / "figures" / file).touch()
    monkeypatch.setattr("sys.argv", ["reproduction.py", str(run)])
    before = page.read_text()
    for _ in range(2):  # written over a page that has numbers already, it stays the same
        reproduction.main()
        written = page.read_text()
        assert before.partition(reproduction.BEGIN)[0] == written.partition(reproduction.BEGIN)[0]
        assert before.partition(reproduction.END)[2] == written.partition(reproduction.END)[2]
    assert "| et | ip_et | −" in written
    assert "| −0.463 | −0.073 |" in written
    assert "| loss MSE | all | 60 |" in written
    pictures = sorted(p.name for p in (tmp_path / "docs" / "reproduction").glob("*.png"))
    assert pictures == made
    assert all(f"](reproduction/{name})" in written for name in pictures)
