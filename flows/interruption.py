"""SIGINT, SIGTERM and SIGHUP end a run within seconds, whatever its threads are in.

A thread that measures or solves cannot be interrupted, and Python waits for its threads: so the process cleans up in a
bounded time and ends without them. Nothing is lost: the store never shows a half-written entry, and the kernel frees locks.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

import psutil

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIMIT_S = 5.0  # for all of the clean-up
HEARD_S = 0.3  # until a signal is heard at the latest
Step = Callable[[], str | None]

_steps: list[Step] = []


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, a signal ends the process and its children, with a sentence on stderr and exit code 128 + its number.

    Signals that are ignored (nohup, a shell's background) stay so.
    """
    before = {
        number: signal.signal(number, _end)
        for number in SIGNALS
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def when_interrupted(step: Step) -> Iterator[None]:
    """Within, a signal first calls `step`, which may return a clause for the sentence. The last step added goes first."""
    _steps.append(step)
    try:
        yield
    finally:
        _steps.remove(step)


def awaited(future: Future[T]) -> T:
    """What a future returns, or raises. Signals are heard meanwhile.

    In short steps: Polars, once imported, has the system restart the wait that Ctrl-C comes in, and Python calls no handler
    before the wait has ended.
    """
    while not wait([future], HEARD_S).done:
        pass
    return future.result()


def _end(number: int, frame: FrameType | None) -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    logging.disable()
    told = ["Interrupted: run the same command again to go on"]
    # in a thread, since a step may wait for a lock that this one holds
    cleaning = threading.Thread(target=_clean_up, args=(told,), daemon=True)
    cleaning.start()
    cleaning.join(LIMIT_S)
    _kill_children()
    with suppress(OSError):  # a terminal that has gone
        os.write(2, (", ".join(told) + ".\n").encode())
    os._exit(128 + number)


def _clean_up(told: list[str]) -> None:
    for step in reversed(_steps):
        with suppress(Exception):  # the next one is to be tried all the same
            told += filter(None, [step()])
    atexit._run_exitfuncs()  # the last logs are sent, temporary folders removed


def _kill_children() -> None:
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
