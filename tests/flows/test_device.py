"""One device runs one measurement at a time, whatever process it belongs to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from models import ROOT

HOLD = """
import sys, time
from tasks.device import exclusive
with exclusive(sys.argv[1], alone=sys.argv[2] == "alone"):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path, device: str = "cpu", how: str = "alone") -> subprocess.Popen[str]:
    """A process that takes the device and keeps it."""
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, device, how]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, process_group=0)


def has_it(process: subprocess.Popen[str]) -> bool:
    """Whether the process has said so."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return "held" in (process.stdout.read() or "")


def wait_for(process: subprocess.Popen[str]) -> None:
    """Until the process has its device."""
    deadline = time.monotonic() + 60
    while not has_it(process):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_device_is_held_by_one_process(tmp_path: Path) -> None:
    """A second process waits, one that times nothing too; another device is free; the lock goes with a holder that is killed."""
    first, processes = holder(tmp_path), []
    try:
        wait_for(first)
        second, other = holder(tmp_path, how="shared"), holder(tmp_path, "another")
        processes = [second, other]
        wait_for(other)
        time.sleep(1)
        assert not has_it(second)
        os.killpg(first.pid, signal.SIGKILL)
        wait_for(second)
        beside, alone = holder(tmp_path, how="shared"), holder(tmp_path)
        processes += [beside, alone]
        wait_for(beside)
        time.sleep(1)
        assert not has_it(alone), "a timing waits for what is not timed"
    finally:
        for process in (first, *processes):
            process.kill()
            process.wait()
