"""What a time is read from, and on how many threads it runs.

On a CPU other guests disturb wall time on several threads most: each forward waits for its slowest thread. The CPU seconds of one
thread count no waiting at all. Of seven pairs beside eight busy processes, the gain of all linears in INT8 had a standard
deviation of 0.83 of itself by wall time on two threads, 0.28 on one, and 0.24 in CPU seconds on one (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from mpq.errors import MpqError

Wanted: TypeAlias = Literal["auto", "wall", "cpu"]


@dataclass(frozen=True)
class Clock:
    """`reads`: `wall`; `cpu`, the CPU seconds of the one thread that works; `events`, a GPU's own between two replays.

    `threads` are those that a CPU's kernels use; None on a GPU, whose times do not hang on them.
    """

    reads: Literal["wall", "cpu", "events"]
    threads: int | None

    @property
    def waits(self) -> bool:
        """Whether time counts that the process waited for a core."""
        return self.reads != "cpu"

    @contextmanager
    def held(self) -> Iterator[None]:
        """This thread's kernels, torch's and ours (OpenMP), on `threads` threads inside the context; as before outside."""
        if self.threads is None:
            yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def clock_of(
    device: str, threads: int | None = None, wanted: Wanted = "auto", graph: bool = True
) -> Clock:
    """The clock of a device (`cpu`, `cuda`): one thread and its CPU seconds on a CPU unless told otherwise.

    Raises MpqError for CPU seconds of several threads, which are no time to wait for a token, and of a GPU's host.
    """
    if device != "cpu":
        if wanted == "cpu":
            raise MpqError(
                f"timing.clock is cpu, the device {device}: expected auto or wall there."
            )
        return Clock("events" if graph else "wall", None)
    threads = threads or 1
    if wanted == "cpu" and threads > 1:
        raise MpqError(
            f"timing.clock is cpu with {threads} threads: expected clock wall or auto, or threads 1."
        )
    return Clock("cpu" if threads == 1 and wanted != "wall" else "wall", threads)
