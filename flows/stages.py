"""Running the stages of a flow: submit, wait, and account for what was computed and what was re-used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from prefect import Task
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from tasks.stage import References

Call = tuple[Task[..., References], str, str, dict[str, Any]]  # task, key, label, inputs
Listener = Callable[[str, int, int, float], None]  # stage, tasks, cached, seconds

_listener: Listener | None = None


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of each stage that ends in this process: flow parameters must be plain data, a callback is none."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


@dataclass
class Stages:
    """Submits the calls of one stage after the other to the flow's task runner, against one store."""

    store: str
    done: list[tuple[str, int, int, float]] = field(default_factory=list)

    def run(self, name: str, calls: Iterable[Call]) -> list[References]:
        """Run a stage and wait for all of it; a failure is raised once the others have ended, so their work is kept."""
        start = time.perf_counter()
        futures: list[PrefectFuture[References]] = [
            task.submit(key=key, store=self.store, label=label, inputs=inputs) for task, key, label, inputs in calls
        ]
        for future in futures:
            future.wait()
        cached = sum(future.state.name == "Cached" for future in futures)
        account = (name, len(futures), cached, time.perf_counter() - start)
        get_run_logger().info("%s: %d of %d tasks cached, %.1f s", name, cached, len(futures), account[3])
        self.done.append(account)
        if _listener:
            _listener(*account)
        return [future.result() for future in futures]

    def run_one(self, name: str, call: Call) -> References:
        """Run a stage of one task."""
        return self.run(name, [call])[0]
