"""`mpq eval`: which model, revision and text a plan is evaluated on."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import write_checkpoint
from typer.testing import CliRunner

from mpq.cli.main import app
from mpq.errors import MpqError
from mpq.program.plan import Plan


def test_an_evaluation_reads_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan's own revision and way to read a text are of its own model and text: of others there is --field, and no revision."""
    checkpoint = write_checkpoint(tmp_path / "model")
    of = {"model": str(checkpoint), "revision": "v2", "text": {"field": "body", "split": "test"}}
    plan = Plan("ip_m", "m", 0.1, "fp32", {}, 0.0, 0.0, 0.0, 1.0, provenance=of)
    (tmp_path / "plan.json").write_text(plan.to_json())
    asked: list[object] = []

    def read_text(folder: Path, source: str, **how: object) -> None:
        asked.append((source, how.get("field"), how.get("split")))
        raise MpqError("enough")

    def fetch(path: str, revision: str | None, trusted: bool) -> Path:
        asked.append(revision)
        return checkpoint

    monkeypatch.setattr("mpq.method.read_text", read_text)
    monkeypatch.setattr("mpq.models.checkpoint.fetch", fetch)
    told = ("--text", "a.jsonl", "--field", "words")
    for more in (("--text", "a.jsonl"), told, (*told, "--model", "other/model")):
        command = ["eval", str(tmp_path / "plan.json"), "--device", "cpu", *more]
        assert "enough" in str(CliRunner().invoke(app, command).exception)
    asked_of_others = ("a.jsonl", None, None), ("a.jsonl", "words", None)
    assert asked == ["v2", asked_of_others[0], "v2", asked_of_others[1], None, asked_of_others[1]]
