"""Running the stages of a flow: submit, wait, and account for what was computed and what was re-used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

from prefect import Task
from prefect.logging import get_run_logger

from mpq.errors import MpqError
from mpq.flows.place import On, Place
from mpq.store.entries import Store
from mpq.tasks.progress import tracked
from mpq.tasks.stage import References, kinds_of

Call = tuple[Task[..., References], str, str, dict[str, Any]]  # task, key, label, inputs
Listener = Callable[[str, int, int, float], None]  # stage, tasks, cached, seconds

_listener: Listener | None = None
_reader: Callable[[str], None] | None = None


@contextmanager
def listening(listener: Listener, reader: Callable[[str], None]) -> Iterator[None]:
    """Tell `listener` of each stage that ends in this process, `reader` what flows have to say: flow parameters must be
    plain data, a callback is none."""
    global _listener, _reader
    _listener, _reader = listener, reader
    try:
        yield
    finally:
        _listener = _reader = None


def tell(text: str) -> None:
    """Say something to whoever watches the flow: in its log, and on the terminal where it was started from one."""
    get_run_logger().info(text)
    if _reader:
        _reader(text)


@dataclass
class Stages:
    """Submits the calls of one stage after the other to where they belong, against one store.

    With `only`, stages of other names must be in the store already: asked to compute one, `run` raises MpqError.
    A task that takes longer than `timeout_s` is given up.
    """

    store: str
    place: Place = field(default_factory=Place)
    only: frozenset[str] | None = None
    timeout_s: float | None = None
    done: list[tuple[str, int, int, float]] = field(default_factory=list)

    def run(self, name: str, calls: Iterable[Call], on: On = "flow") -> list[References]:
        """Run a stage and wait for all of it; a failure is raised once the others have ended, so their work is kept."""
        start, calls = time.perf_counter(), list(calls)
        if self.only is not None and name not in self.only:
            return self._stored(name, calls, start)
        futures = [
            self.place.submit(
                self._timed(task),
                {"key": key, "store": self.store, "label": label, "inputs": inputs},
                on,
            )
            for task, key, label, inputs in calls
        ]
        with tracked(name) if len(futures) > 1 else nullcontext(_nowhere) as progress:
            for done, future in enumerate(futures, 1):
                future.wait()
                progress(done, len(futures))
        results = [self.place.result(future) for future in futures]
        failed = next(
            (
                self._told(r, call[2])
                for r, call in zip(results, calls, strict=True)
                if isinstance(r, BaseException)
            ),
            None,
        )
        cached = sum(
            future.state.name == "Cached"
            for future, r in zip(futures, results, strict=True)
            if isinstance(r, dict)
        )
        self._account(name, len(futures), cached, start)
        if failed:
            raise failed
        return cast(list[References], results)

    def run_one(self, name: str, call: Call, on: On = "flow") -> References:
        """Run a stage of one task."""
        return self.run(name, [call], on)[0]

    def _timed(self, task: Task[..., References]) -> Task[..., References]:
        return task.with_options(timeout_seconds=self.timeout_s) if self.timeout_s else task

    def _told(self, error: BaseException, label: str) -> BaseException:
        if type(error).__name__ != "TaskRunTimeoutError":
            return error
        return MpqError(
            f"{label} took longer than {self.timeout_s:g} s: look at what the device is busy with, or raise runner.timeout_s in the spec."
        )

    def _stored(self, name: str, calls: list[Call], start: float) -> list[References]:
        store = Store(self.store)
        found = [
            {kind: store.find(kind, key) for kind in kinds_of(task)} for task, key, _, _ in calls
        ]
        if missing := [
            call[2] for call, refs in zip(calls, found, strict=True) if not all(refs.values())
        ]:
            raise MpqError(
                f"The store {self.store} has no table for {missing[0]} ({len(missing)} of {len(calls)} {name} tasks are missing): "
                "run calibrate with this spec first."
            )
        self._account(name, len(calls), len(calls), start)
        return cast(list[References], found)

    def _account(self, name: str, tasks: int, cached: int, start: float) -> None:
        account = (name, tasks, cached, time.perf_counter() - start)
        get_run_logger().info("%s: %d of %d tasks cached, %.1f s", name, cached, tasks, account[3])
        self.done.append(account)
        if _listener:
            _listener(*account)


def _nowhere(done: int, total: int) -> None:
    """Progress of a stage of one task, which shows its own."""
