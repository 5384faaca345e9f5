"""A run killed with -9 in the middle of a stage goes on where it was."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import preloaded
import pytest
import yaml
from small import DEMO, ROOT, own_prefect
from test_calibrate import change

from mpq.spec import RunSpec

# what is drawn takes seconds, and other tests look at it
UNDRAWN = """
import mpq.paper.figures, mpq.report.figures as figures
from mpq.cli.main import main
figures.report_figures = lambda *_: {section: [] for section in figures.SECTIONS}
figures.frontier_png = lambda *_: b"\\x89PNG"
mpq.paper.figures.write_figures = lambda *_: []
main()
"""


def start(spec: Path, home: Path, command: str = "run") -> preloaded.Process:
    """`mpq run` or another command in a session of its own, with the tests' Prefect server."""
    return preloaded.Process(
        ["-c", UNDRAWN, command, str(spec)],
        ROOT,
        own_prefect(home, server=False),
        home.with_suffix(".log"),
    )


def test_a_mistake_in_a_run_is_one_sentence(spec: RunSpec, tmp_path: Path) -> None:
    """An unreachable store: exit code 2, no traceback, nothing begun."""
    path = tmp_path / "spec.yaml"
    path.write_text(
        yaml.safe_dump({**spec.model_dump(mode="json"), "store": "file:///proc/nowhere"})
    )
    process = start(path, tmp_path / "home")
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 2, output
    assert "/proc/nowhere" in output
    assert "Traceback" not in output


def test_killed_twice_and_started_again(spec: RunSpec, tmp_path: Path) -> None:
    """What was stored before a kill is cached after it, down to the single configuration, and the run ends well."""
    spec = change(spec, taus=[0.01])
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    # the last of the three tables that a shard writes: killed between two of them it is rightly computed again
    before = killed(path, tmp_path, "effects", "run")
    before = killed(path, tmp_path, "measurement", "run") | before  # as they were first
    output, _ = start(path, tmp_path / "home").communicate(timeout=280)
    assert "done in" in output, output
    assert re.search(r"load model +1 task +cached", output), output
    assert all(p.stat().st_mtime_ns == at for p, at in before.items()), (
        "what was there has been computed again"
    )


def killed(spec: Path, folder: Path, stage: str, command: str) -> dict[Path, int]:
    """Kill the command with -9 once it has stored something of `stage`; what the store holds then, and when each was written."""
    process = start(spec, folder / "home", command)
    stored = folder / "store" / stage
    deadline = time.monotonic() + 240
    while (
        not list(stored.glob("*/meta.json"))
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in (folder / "store").rglob("meta.json")}
    assert list(stored.glob("*/meta.json"))
    return before


def test_a_killed_sweep_goes_on(spec: RunSpec, tmp_path: Path) -> None:
    """Killed between two scores of harness tasks: every score that was stored is re-used, and the forecast counts them."""
    pytest.importorskip("lm_eval")
    text = {"source": "tasks", "samples": 8, "length": 32, "batch": 8}
    tasks = {
        "tasks": ["piqa", "winogrande"],
        "data_dir": str(ROOT / "examples" / "tasks"),
        "task_limit": 4,
    }
    data = {
        **spec.model_dump(mode="json"),
        "model": {"path": str(DEMO), "base": "fp32"},
        "calibration": {**text, "shards": 1},
        "evaluation": {**text, **tasks, "seeds": 1},
        "objectives": {"tt": {"formats": ["fp8_e5m2"], "random_seeds": 2}},
        "taus": [0.002],
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(data))
    before = killed(path, tmp_path, "plan_tasks", "reproduce")
    scored = len(list((tmp_path / "store" / "plan_tasks").glob("*/meta.json")))
    output, _ = start(path, tmp_path / "home", "reproduce").communicate(timeout=280)
    assert "done in" in output, output
    assert all(p.stat().st_mtime_ns == at for p, at in before.items()), (
        "what was there has been computed again"
    )
    stage = re.search(r"✓ tasks +(\d+) tasks +(\d+) of \1 cached", output)
    assert stage, output
    assert scored <= int(stage[2]) < int(stage[1])
    assert re.search(r"evaluations: \d+, \d+ of them cached, about", output), output
