"""A run killed with -9 in the middle of a stage goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from models import ROOT

from mpq.spec import RunSpec


def start(spec: Path, home: Path) -> subprocess.Popen[str]:
    """`mpq run` in a process group of its own, its ephemeral Prefect server included."""
    environment = {**os.environ, "PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    for name in (
        "PREFECT_API_URL",
        "PREFECT_TEST_MODE",
        "PREFECT_API_DATABASE_CONNECTION_URL",
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH",
    ):
        environment.pop(name, None)
    command = [sys.executable, "-c", "from mpq.cli import main; main()", "run", str(spec)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_a_mistake_in_a_run_is_one_sentence(spec: RunSpec, tmp_path: Path) -> None:
    """An unreachable store: exit code 2, no traceback, nothing begun."""
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**spec.model_dump(mode="json"), "store": "file:///proc/nowhere"}))
    process = start(path, tmp_path / "home")
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 2, output
    assert "/proc/nowhere" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("stage", ["sensitivity", "measurement"])
def test_killed_and_started_again(stage: str, spec: RunSpec, tmp_path: Path) -> None:
    """What was stored before the kill is cached after it, down to the single configuration, and the run ends well."""
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    process = start(path, tmp_path / "home")
    stored = tmp_path / "store" / stage
    deadline = time.monotonic() + 240
    while not list(stored.glob("*/meta.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("meta.json")}
    assert before
    output, _ = start(path, tmp_path / "home").communicate(timeout=280)
    assert "done in" in output, output
    assert "load model       1 task   cached" in output, output
    assert all(p.stat().st_mtime_ns == at for p, at in before.items()), "what was there has been computed again"
