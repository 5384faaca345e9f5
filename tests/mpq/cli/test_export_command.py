"""`mpq export` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import write_checkpoint
from test_cli import mpq

from mpq.program.plan import Plan


def written(folder: Path, **more: object) -> Path:
    """A plan's file, for the tiny Llama beside it."""
    formats = {f"model.layers.0.self_attn.{x}_proj": "int8" for x in "qkvo"}
    plan = Plan("ip_m", "m", 0.01, "fp32", formats, 1e-4, 1e-3, 1e3, 16.0, **more)  # type: ignore[arg-type]
    file = folder / "plan.json"
    file.write_text(plan.to_json())
    return file


def test_export_without_a_check(tmp_path: Path) -> None:
    """The folder is written, JSON says that nothing was checked, and so does export.json."""
    model = write_checkpoint(tmp_path / "model")
    plan = written(tmp_path, provenance={"model": str(model)})
    done = mpq("export", plan, "--out", tmp_path / "out", "--no-check", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["exported"] == [{"format": "int8", "ops": 4}, {"format": "fp32 (base)", "ops": 11}]
    assert said["check"]["done"] is False
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert "--no-check" in record["check"]["why"]


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("{", (), "Not a plan"),
        (None, (), "cannot be read"),
        ("plan", ("--no-check",), "which model it belongs to"),
        ("plan", ("--model", "MODEL"), "which text to check on"),
        ("plan", ("--model", "MODEL", "--to", "gguf", "--no-check"), "Unknown target 'gguf'"),
    ],
)
def test_mistakes(tmp_path: Path, content: str | None, options: tuple[str, ...], said: str) -> None:
    """A plan that is none, and what the plan does not say and nobody gives, are one sentence."""
    model = write_checkpoint(tmp_path / "model")
    plan = written(tmp_path)
    if content is None:
        plan.unlink()
    elif content != "plan":
        plan.write_text(content)
    given = [str(model) if o == "MODEL" else o for o in options]
    done = mpq("export", plan, "--out", tmp_path / "out", "--device", "cpu", *given)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
