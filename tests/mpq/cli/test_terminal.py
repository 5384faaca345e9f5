"""What reaches a terminal: text that it can show, and nothing that steers it."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import polars as pl
import pytest
from test_cli import mpq

from mpq.cli import main as cli
from mpq.cli.console import emit


def test_a_terminal_that_knows_ascii_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it cannot show is escaped, on stdout and on stderr; nothing raises."""
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["mpq", "run", "./τ.yaml"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    sys.stderr.flush()
    sys.stderr.buffer.seek(0)
    told = sys.stderr.buffer.read().decode("ascii")
    assert end.value.code == 2
    assert "No spec at \\u03c4.yaml" in told


def test_names_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets in names are no markup, an escape sequence does not reach the terminal, a path stays in one line."""
    monkeypatch.setenv("COLUMNS", "80")
    frame = pl.DataFrame({"op[bold]": ["[/red]a", "\x1b[31mred"]})
    path = "/a/[bold]/" + "x" * 100
    emit(frame, False, None, "t", {"plan": path, "name": "\x1b]0;title\x07"})
    out = capsys.readouterr().out
    assert "op[bold]" in out
    assert "[/red]a" in out
    assert "\\x1b[31mred" in out
    assert f"plan: {path}\n" in out
    assert "\x1b" not in out
    assert "\x07" not in out
    done = mpq("report", "[bold]no[/red]\x1b[31m")
    assert done.returncode == 2
    assert "No run at [bold]no[/red]\\x1b[31m" in " ".join(done.stderr.split())


def test_log_lines_do_not_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is logged is shown as sentences are: a name of others' in it, and a URL's password."""

    def warn() -> None:
        logging.getLogger("mpq").warning("%s left out", "\x1b[2Jlayer s3://a:secret@b/c")

    monkeypatch.setattr(cli, "app", warn)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # pytest's own
    cli.main()
    assert capsys.readouterr().err == "\\x1b[2Jlayer s3://***@b/c left out\n"
