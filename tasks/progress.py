"""Progress of long stages: a bar in the terminal, an artifact in Prefect."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from rich.progress import Progress

_terminal: Progress | None = None
_EVERY_S = 2.0  # an artifact update is an API call


@contextmanager
def terminal(progress: Progress) -> Iterator[None]:
    """Show the bars of tasks that run in this process on `progress`."""
    global _terminal
    _terminal = progress
    try:
        with progress:
            yield
    finally:
        _terminal = None


@contextmanager
def tracked(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) for a long computation, shown wherever someone may look."""
    bar = _terminal.add_task(label, total=None) if _terminal else None
    artifact = (
        create_progress_artifact(progress=0.0, description=label)
        if TaskRunContext.get() or FlowRunContext.get()
        else None
    )
    last, lock = 0.0, threading.Lock()

    def advance(done: int, total: int) -> None:
        nonlocal last
        if _terminal and bar is not None:
            _terminal.update(bar, completed=done, total=total)
        with lock:
            due = artifact is not None and (done == total or time.monotonic() - last > _EVERY_S)
            if due:
                last = time.monotonic()
        if due and artifact is not None:
            update_progress_artifact(artifact_id=artifact, progress=100.0 * done / total)  # type: ignore[arg-type]

    try:
        yield advance
    finally:
        if _terminal and bar is not None:
            _terminal.remove_task(bar)
