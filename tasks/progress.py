"""Progress of long stages: a bar in the terminal, an artifact in Prefect."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from rich.progress import Progress

_terminal: Progress | None = None
_EVERY_S = 2.0  # an artifact and its updates are API calls: what is done sooner has none


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


def _key(label: str) -> str | None:
    """What a stage's progress is called among Prefect's artifacts, each run's a version of it; none outside of a run."""
    task = TaskRunContext.get()
    if not task and not FlowRunContext.get():
        return None
    name = task.task.name if task else label
    return "progress-" + re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


@contextmanager
def tracked(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) for a long computation, shown wherever someone may look."""
    bar = _terminal.add_task(label, total=None) if _terminal else None
    key, artifact = _key(label), cast(UUID | None, None)
    last, lock = time.monotonic(), threading.Lock()

    def advance(done: int, total: int) -> None:
        nonlocal artifact, last
        if _terminal and bar is not None:
            _terminal.update(bar, completed=done, total=total)
        with lock:
            due = time.monotonic() - last > _EVERY_S or (done == total and artifact)
            if not key or not due:
                return
            percent, last = 100.0 * done / total, time.monotonic()
            if artifact:
                update_progress_artifact(artifact_id=artifact, progress=percent)
            else:
                artifact = cast(UUID, create_progress_artifact(percent, key, description=label))

    try:
        yield advance
    finally:
        if _terminal and bar is not None:
            _terminal.remove_task(bar)
