"""The command while it is still being imported."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small import ROOT

from mpq.cli.main import main

SLOW = "import time; print('importing', flush=True); time.sleep(600)"


def test_ctrl_c_while_importing(tmp_path: Path) -> None:
    """It ends as any program does, by the signal and without a traceback."""
    (tmp_path / "typer.py").write_text(SLOW)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    begun = subprocess.Popen(
        [sys.executable, "-P", "-m", "mpq", "formats"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert begun.stdout
    assert begun.stdout.readline() == "importing\n"
    begun.send_signal(signal.SIGINT)
    said, _ = begun.communicate(timeout=60)
    assert (begun.returncode, said) == (-signal.SIGINT, "")


@pytest.mark.parametrize("where", ["mpq.formats.scheme.table_of_schemes", "mpq.cli.main.app"])
def test_ctrl_c_in_a_command(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said, and the exit code is the signal's, also while the command line is still being read."""

    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["mpq", "formats"])
    monkeypatch.setattr(where, pressed)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "Interrupted.\n"
