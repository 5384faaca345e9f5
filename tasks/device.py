"""One accelerator runs one thing at a time, whatever process it belongs to."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(device: str) -> Iterator[None]:
    """Hold `device` of this machine; wait while another task has it. The lock goes when its holder dies.

    Non-blocking attempts, so that a waiting task can still be cancelled.
    """
    path = Path(tempfile.gettempdir()) / f"mpq-{os.getuid()}-{device.replace(':', '-')}.lock"
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield
