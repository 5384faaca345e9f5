"""One device runs one measurement at a time, whatever process it belongs to."""

from __future__ import annotations

import os
import time
from pathlib import Path

import preloaded
from small import ROOT

from deployments.processes import until

HOLD = """
import sys, time
from pathlib import Path
from mpq.tasks.device import exclusive
Path(sys.argv[3] + ".asked").touch()
with exclusive(sys.argv[1], alone=sys.argv[2] == "alone"):
    Path(sys.argv[3]).touch()
    time.sleep(600)
"""


class Holder:
    """A process that takes the device and keeps it."""

    def __init__(self, folder: Path, name: str, device: str = "cpu", how: str = "alone") -> None:
        self._mark = folder / name
        environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        command = ["-c", HOLD, device, how, str(self._mark)]
        self.process = preloaded.Process(command, ROOT, environment, folder / f"{name}.log")

    def has_it(self) -> bool:
        """Whether it holds the device, or has."""
        return self._mark.exists()

    def wait(self) -> None:
        """Until it has its device."""
        until("the device", self.has_it)

    def is_refused(self) -> bool:
        """Whether it still has no device half a second after it has asked: where it is free it has it at once."""
        until("the question", self._mark.with_suffix(".asked").exists)
        time.sleep(0.5)
        return not self.has_it()

    def kill(self) -> None:
        """With -9."""
        self.process.kill()
        self.process.wait()


def test_a_device_is_held_by_one_process(tmp_path: Path) -> None:
    """A second process waits, one that times nothing too; another device is free; the lock goes with a holder that is killed."""
    holders = [Holder(tmp_path, "first")]
    try:
        holders[0].wait()
        holders += [Holder(tmp_path, "second", how="shared"), Holder(tmp_path, "other", "another")]
        _, second, other = holders
        other.wait()
        assert second.is_refused()
        holders[0].kill()
        second.wait()
        holders += [Holder(tmp_path, "beside", how="shared"), Holder(tmp_path, "alone")]
        holders[3].wait()
        assert holders[4].is_refused(), "a timing waits for what is not timed"
    finally:
        for holder in holders:
            holder.kill()
