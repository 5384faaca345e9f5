"""The README's promises that a machine can check."""

from __future__ import annotations

import re

import pytest
from small import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example runs as printed, and prints what its plan costs."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    assert "loss_mse" in capsys.readouterr().out


def test_spec_example_is_valid() -> None:
    """The YAML example is a spec."""
    import yaml

    from mpq.spec import parse_spec

    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert parse_spec(yaml.safe_load(text)).name == "my-model"


def test_every_command_is_told() -> None:
    """Each command of the CLI is in the README, and each `make` target that it names exists."""
    from mpq.cli.main import app

    for command in app.registered_commands:
        assert f"`mpq {command.name or command.callback.__name__}" in README
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"^\$ make ([\w-]+)", README, re.M)) <= set(targets)


def test_links_lead_somewhere() -> None:
    """Every relative link and picture is a file."""
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
