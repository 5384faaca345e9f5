"""Devices: one runs one measurement at a time, whatever process it belongs to; what kind it is, and which code runs there."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import platform
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import mpq
from mpq.caches import private_temporary_folder
from mpq.devices import resolve
from mpq.errors import MpqError
from mpq.store.entries import content_key
from mpq.tasks.stage import stop_if_stored

log = logging.getLogger("mpq")
TELL_AFTER_S = 5.0


@contextmanager
def exclusive(device: str, alone: bool = True) -> Iterator[None]:
    """Hold `device` of this machine; wait while another task has it. The lock goes when its holder dies.

    What is not timed need not be `alone` on a CPU: such tasks run beside each other, never beside a timing.
    Non-blocking attempts, so that a waiting task can still be cancelled.
    """
    # two workers may each call their own card `cuda`
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    which = f"{device}-{cards}" if device.startswith("cuda") else device
    name = f"{re.sub(r'[^A-Za-z0-9]+', '-', which).strip('-')}.lock"
    path = private_temporary_folder("devices") / name
    how = fcntl.LOCK_EX if alone or device != "cpu" else fcntl.LOCK_SH
    try:  # a link that someone put there is not followed
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MpqError(
            f"The lock {path}, by which one measurement at a time has {device}, cannot be opened "
            f"({error.strerror}): take it away."
        ) from None
    with os.fdopen(lock) as file:
        told = time.monotonic() + TELL_AFTER_S
        while True:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            if time.monotonic() > told:
                told = math.inf
                log.warning("Waiting for %s: another measurement on this machine has it.", device)
        stop_if_stored()  # the one that had it may have been another run, at the same thing
        yield


def timed_name(device: str, threads: int | None = None, engine: str = "torch") -> str:
    """What times taken on `device`, on so many threads, by `engine` are kept under: an engine's with its version."""
    if engine == "vllm":
        from mpq.timing.in_vllm import vllm_device_name

        return vllm_device_name(device, threads)
    from mpq.kernels import device_name

    return device_name(device, threads)


def check_device(device: str, name: str, threads: int | None = None, engine: str = "torch") -> None:
    """Raise MpqError unless `device`, on so many threads, is of the kind that its timing will be kept under."""
    if (here := timed_name(device, threads, engine)) != name:
        raise MpqError(
            f"{device} of {platform.node()} is {here}, the timing is for {name}: give each kind a cluster of its own."
        )


def identity(device: str | None = None) -> str:
    """The device's name, or without one the versions of mpq's code and torch: equal where tables are interchangeable."""
    from mpq.kernels import device_name

    if device:
        return device_name(resolve(device))
    return f"mpq {_code()[:12]}, torch {version('torch')}"


def reaches(url: str) -> bool:
    """Whether this machine can open a connection to a URL's host and port."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=10).close()
    except OSError:
        return False
    return True


def _code() -> str:
    folders = [Path(str(m.__file__)).parent for m in (mpq, import_module("mpq.tasks"))]
    sources = sorted(f for folder in folders for f in folder.rglob("*.py"))
    return content_key([hashlib.sha256(f.read_bytes()).hexdigest() for f in sources])
